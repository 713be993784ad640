"""What one update does to the weights: whole runs beside an AdamW written out in float64."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.cli.config_command import configuration
from shared.models.spec import read_model_spec
from tests.train.test_distill import arguments, distill, final_bytes
from train.cli.app import app as wantrain
from train.config import DistillConfig
from train.data.batches import MicroBatches, load_prompt_bank
from train.methods.dmd import critic_step, generator_step
from train.model.base import base_digest, load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles
from train.prepare import prepare_distillation as prepare
from train.saving.lora_formats import FORMS
from train.saving.provenance import read_provenance

Array = npt.NDArray[np.float64]

# Every number matters: gradients are clipped, eps is of their size, decay and both betas show.
ADAM = (
    "--max-grad-norm", "0.002", "--adam-beta1", "0.5", "--adam-beta2", "0.7",
    "--adam-epsilon", "2e-5", "--adam-weight-decay", "0.3", "--learning-rate", "1e-2",
    "--learning-rate-critic", "2e-2", "--lr-warmup-steps", "3",
)  # fmt: skip
# With a large eps AdamW is linear in the gradient, so that its size shows and rounding doesn't.
LINEAR = (
    "--max-grad-norm", "1000", "--adam-epsilon", "0.1", "--learning-rate", "0.1",
    "--learning-rate-critic", "0.1",
)  # fmt: skip


def config_of(model: Path, shards: Path, out: Path, *more: str) -> DistillConfig:
    """The configuration that the command line makes of these arguments."""
    config = configuration(wantrain, arguments(model, shards, out, *more))
    assert isinstance(config, DistillConfig)
    return config


def weights_of(checkpoint: Path, role: str) -> dict[str, Array]:
    tensors = load_file(checkpoint / f"{role}_weights.safetensors")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def _distance(one: dict[str, Array], other: dict[str, Array], start: dict[str, Array]) -> float:
    """Of two updated states, relative to how far they came from the start."""
    assert one.keys() == other.keys() == start.keys()
    apart = sum(float(((one[n] - other[n]) ** 2).sum()) for n in one)
    moved = sum(float(((other[n] - start[n]) ** 2).sum()) for n in one)
    assert moved > 0
    return float((apart / moved) ** 0.5)


class HandMade:
    """Clipping, AdamW, warm-up and the order of updates, in float64 from the textbook."""

    def __init__(self, config: DistillConfig) -> None:
        run = prepare(config)
        spec, bank = (
            read_model_spec(run.spec.folder),
            load_prompt_bank(run.data.first, run.spec.family),
        )
        base = load_base(
            spec, "low", precision="no", device=torch.device("cpu"), gradient_checkpointing=False
        )
        targets = select_targets(base, ("q", "k", "v", "ffn.0", "ffn.2"))
        self.roles = Roles(base, LoraSpec(rank=4, alpha=3, targets=targets), seed=config.seed)
        self.batches = MicroBatches(
            run.data,
            run.plan,
            spec,
            empty_text=bank.empty,
            caption_dropout=0.1,
            frame_crop=False,
            accumulation=2,
            data_rank=0,
            data_size=1,
        )
        self.recipe, self.negative = run.objective.recipe, bank.negative
        self.weights: dict[str, dict[str, Array]] = {
            role: {n: p.detach().double().numpy() for n, p in self.roles.parameters(role).items()}
            for role in (GENERATOR, CRITIC)
        }
        self.start = {role: dict(values) for role, values in self.weights.items()}
        zeros = {r: {n: np.zeros_like(w) for n, w in ws.items()} for r, ws in self.weights.items()}
        self.first, self.second = zeros, {role: dict(values) for role, values in zeros.items()}
        self.logged: list[tuple[str, float, float, float]] = []

    def _gradients(self, role: str, update: int) -> tuple[float, dict[str, Array]]:
        loss = torch.zeros(())
        for micro_step in (0, 1):
            batch = self.batches.load(update, micro_step).to(torch.device("cpu"))
            if role == GENERATOR:
                loss = loss + generator_step(self.roles, self.recipe, batch, self.negative).loss / 2
            else:
                loss = loss + critic_step(self.roles, self.recipe, batch).loss / 2
        names, parameters = zip(*self.roles.parameters(role).items(), strict=True)
        slopes = torch.autograd.grad(loss, parameters)
        return loss.item(), {
            name: slope.double().numpy() for name, slope in zip(names, slopes, strict=True)
        }

    def update(self, role: str, update: int, made: int) -> None:
        """One AdamW step of a role that has made `made` updates (Loshchilov & Hutter, alg. 2)."""
        loss, slopes = self._gradients(role, update)
        norm = sum(float((g**2).sum()) for g in slopes.values()) ** 0.5
        clip = min(1.0, 0.002 / norm)
        rate = (0.01 if role == GENERATOR else 0.02) * min(1.0, (made + 1) / 3)
        self.logged.append((role, loss, norm, rate))
        for name, slope in slopes.items():
            g = clip * slope
            m = self.first[role][name] = 0.5 * self.first[role][name] + 0.5 * g
            v = self.second[role][name] = 0.7 * self.second[role][name] + 0.3 * g**2
            m_hat, v_hat = m / (1 - 0.5 ** (made + 1)), v / (1 - 0.7 ** (made + 1))
            w = self.weights[role][name]
            w = w - rate * 0.3 * w - rate * m_hat / (np.sqrt(v_hat) + 2e-5)
            self.weights[role][name] = w
            self.roles.parameters(role)[name].data.copy_(torch.from_numpy(w))


def test_updates_are_clipped_adamw_with_warm_up(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Two critic updates, one of the generator, twice; checkpointing on, accumulation 2."""
    more = (
        *ADAM, "--mixed-precision", "no", "--gradient-accumulation-steps", "2",
        "--max-train-steps", "2", "--gradient-checkpointing", "--checkpointing-steps", "1",
    )  # fmt: skip
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *more)
    by_hand = HandMade(config_of(tiny_t2v, t2v_shards, tmp_path / "none", *more))
    for generator_update in (0, 1):
        first = 3 * generator_update
        by_hand.update(CRITIC, first, 2 * generator_update)
        by_hand.update(CRITIC, first + 1, 2 * generator_update + 1)
        by_hand.update(GENERATOR, first + 2, generator_update)
        for role in (GENERATOR, CRITIC):
            found = weights_of(out / f"checkpoint-{generator_update + 1}", role)
            assert _distance(found, by_hand.weights[role], by_hand.start[role]) < 1e-4, role

    assert min(norm for _, _, norm, _ in by_hand.logged) > 0.004  # clipped each time
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    for step, (role, *values) in enumerate(by_hand.logged, start=1):
        for name, value in zip(("loss", "grad_norm", "learning_rate"), values, strict=True):
            (found,) = [e.value for e in events.Scalars(f"{name}/{role}") if e.step == step]
            assert found == pytest.approx(value, rel=1e-4), (name, step)


def test_gradient_checkpointing_changes_no_weight(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Blocks are recomputed in backward with the role that trains, in the loop itself too."""
    common = (*LINEAR, "--mixed-precision", "no", "--max-train-steps", "3")
    for name in ("gradient-checkpointing", "no-gradient-checkpointing"):
        distill(tiny_t2v, t2v_shards, tmp_path / name, *common, f"--{name}")
    with_it, without = (folder / "checkpoint-3" for folder in _in(tmp_path))
    for role in (GENERATOR, CRITIC):
        one, other = weights_of(with_it, role), weights_of(without, role)
        assert all(np.array_equal(one[name], other[name]) for name in other), role
    assert len(set(map(str, map(final_bytes, _in(tmp_path))))) == 1


def _in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_accumulated_micro_batches_equal_one_batch(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    common = (*LINEAR, "--mixed-precision", "no", "--max-train-steps", "2")
    cuts = {"whole": (2, 1), "cut": (1, 2)}
    for name, (size, accumulation) in cuts.items():
        distill(
            tiny_t2v, t2v_shards, tmp_path / name, *common, "--train-batch-size", str(size),
            "--gradient-accumulation-steps", str(accumulation),
        )  # fmt: skip
    start = HandMade(
        config_of(
            tiny_t2v, t2v_shards, tmp_path / "none", *common, "--gradient-accumulation-steps", "2"
        )
    ).start
    for role in (GENERATOR, CRITIC):
        whole, cut = (weights_of(tmp_path / name / "checkpoint-2", role) for name in cuts)
        assert _distance(cut, whole, start[role]) < 1e-4, role


@pytest.mark.parametrize(
    ("expert", "component"), [("low", "transformer_2"), ("high", "transformer")]
)
def test_provenance_tells_the_base_and_the_recipe(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, expert: str, component: str
) -> None:
    out = distill(
        tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1", "--boundary-type", expert,
        "--real-guidance-scale", "4.5", "--fake-guidance-scale", "1.5", "--start", "noise",
        "--pairing", "euler", "--flow-shift", "9", "--seed", "77", "--caption-dropout", "0.25",
        "--denoising-step-indices-list", "1000,700,100",
    )  # fmt: skip
    for form in FORMS:
        told = read_provenance(out / f"lora-{expert}-{form}.safetensors")
        assert told.base == base_digest(tiny_t2v, component)
        assert (
            told.recipe.items()
            >= {
                "real_guidance_scale": 4.5,
                "fake_guidance_scale": 1.5,
                "start": "noise",
                "pairing": "euler",
                "score_floor": "boundary",
                "gen_update_interval": 2,
                "seed": 77,
                "caption_dropout": 0.25,
                "learning_rate": 1e-3,
                "learning_rate_critic": 2e-3,
                "train_batch_size": 2,
            }.items()
        )
        assert (told.expert, told.pairing, told.flow_shift) == (expert, "euler", 9.0)
        assert told.denoising_step_indices_list == (1000.0, 700.0, 100.0)
        assert told.boundary == 0.875 and told.mode == "t2v"
    other = {"transformer", "transformer_2"} - {component}
    assert told.base != base_digest(tiny_t2v, other.pop())


@pytest.mark.parametrize(
    ("more", "start"),
    [
        ((), "latents"),
        (("--boundary-type", "low"), "latents"),
        (("--boundary-type", "high"), "noise"),
        (("--boundary-type", "full"), "noise"),
        (("--boundary-type", "low", "--start", "noise"), "noise"),
        (("--boundary-type", "high", "--start", "latents"), "latents"),
    ],
)
def test_default_start_by_expert(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...], start: str,
) -> None:  # fmt: skip
    assert prepare(config_of(tiny_t2v, t2v_shards, tmp_path, *more)).objective.recipe.start == start
    distill(tiny_t2v, t2v_shards, tmp_path, *more, "--dry-run")
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.rindex("}") + 1])["start"] == start


def test_videos_repeat_and_images_do_not(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    """Five clips and a picture."""
    config = config_of(
        tiny_t2v, t2v_shards, tmp_path, "--video-repeat", "3", "--train-batch-size", "1"
    )
    run = prepare(config)
    shown = np.bincount(run.plan.epoch(0).ravel(), minlength=len(run.data))
    frames = [run.data.buckets[bucket].frames for bucket in run.data.bucket_ids]
    assert sorted(zip(frames, shown.tolist(), strict=True)) == [(1, 1)] + [(9, 3)] * 5
