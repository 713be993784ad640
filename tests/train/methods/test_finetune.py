"""`wantrain lora` as a user runs it: what it trains, leaves behind, resumes, refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from tests.models import one_expert
from tests.train.conftest import encode
from tests.train.data.test_caption_only import encode_list
from tests.train.test_distill import distill, final_bytes
from train.cli.app import app as wantrain
from train.saving.provenance import read_provenance

SMALL = (
    "--rank", "4", "--network-alpha", "3", "--learning-rate", "1e-3", "--train-batch-size", "2",
    "--dataloader-num-workers", "0", "--mixed-precision", "no", "--device", "cpu",
)  # fmt: skip


def finetune(model: Path, shards: Path, out: Path, *more: str) -> Path:
    wantrain(
        [
            "lora", "--model", str(model), "--shards", str(shards), "--output-dir", str(out),
            *SMALL, *one_expert(model), *more,
        ],
        standalone_mode=False,
    )  # fmt: skip
    return out


def loss_curve(out: Path) -> dict[int, float]:
    curve: dict[int, float] = {}
    for file in sorted((out / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file))
        events.Reload()
        curve |= {e.step: e.value for e in events.Scalars("loss/lora")}
    return curve


AVERAGED = ("--ema-decay", "0.75", "--ema-start", "1", "--gradient-accumulation-steps", "2")


@pytest.fixture(scope="module")
def finished(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates of the low expert, averaged, not interrupted."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return finetune(tiny_t2v, t2v_shards, out, "--max-train-steps", "4", *AVERAGED)


def test_one_role_trains_and_every_file_is_there(finished: Path) -> None:
    assert list(loss_curve(finished)) == [1, 2, 3, 4]
    assert sorted(path.name for path in (finished / "checkpoint-4").iterdir()) == [
        "lora_ema.safetensors",
        "lora_optimizer.safetensors",
        "lora_weights.safetensors",
        "state.json",
    ]
    weights = load_file(finished / "checkpoint-4" / "lora_weights.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)


def test_its_files_say_what_they_are(finished: Path, tiny_t2v: Path) -> None:
    for file in final_bytes(finished):
        told = read_provenance(finished / file)
        assert (told.method, told.expert, told.mode) == ("lora", "low", "t2v")
        assert (told.flow_shift, told.boundary) == (12.0, 0.875)
        assert told.denoising_step_indices_list == () and told.pairing is None
        assert told.recipe["timestep_sampling"] == "uniform" and told.updates == 4
        with safe_open(finished / file, framework="pt") as opened:
            metadata = opened.metadata()
        assert metadata["ss_steps"] == "4"
        assert metadata["modelspec.timestep_range"] == "0,875"
        assert "of the base model; trained at shift 12" in metadata["modelspec.usage_hint"]
        assert "learning_rate_critic" not in told.recipe and told.recipe["learning_rate"] == 1e-3


@pytest.mark.parametrize(("at", "workers"), [(1, "0"), (2, "2"), (3, "0")])
def test_resumed_equals_uninterrupted(
    finished: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, at: int, workers: str
) -> None:
    out = tmp_path / "out"
    finetune(tiny_t2v, t2v_shards, out, "--max-train-steps", str(at), *AVERAGED)
    finetune(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "4", *AVERAGED,
        "--resume-from-checkpoint", "latest", "--dataloader-num-workers", workers,
    )  # fmt: skip
    assert final_bytes(out) == final_bytes(finished)
    assert loss_curve(out) == loss_curve(finished)
    for file in (finished / "checkpoint-4").glob("*.safetensors"):
        assert file.read_bytes() == (out / "checkpoint-4" / file.name).read_bytes()


def test_it_learns_the_clips_by_heart(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    """Over many updates the loss falls: the gradient leads somewhere."""
    out = finetune(
        tiny_t2v, t2v_shards, tmp_path, "--max-train-steps", "60", "--learning-rate", "1e-2",
        "--boundary-type", "high", "--max-grad-norm", "1", "--no-gradient-checkpointing",
    )  # fmt: skip
    curve = np.array(list(loss_curve(out).values()))
    assert curve[-20:].mean() < 0.8 * curve[:10].mean()


@pytest.mark.parametrize("mode", ["i2v", "ti2v", "wan21-i2v"])
def test_every_family_trains_and_resumes(
    mode: str, dataset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{mode.replace('-', '_')}")
    shards = encode(dataset, model, tmp_path / "shards")
    more = ("--mixed-precision", "bf16")
    whole = finetune(model, shards, tmp_path / "whole", "--max-train-steps", "3", *more)
    out = tmp_path / "out"
    finetune(model, shards, out, "--max-train-steps", "1", *more)
    finetune(
        model, shards, out, "--max-train-steps", "3", "--resume-from-checkpoint", "latest", *more
    )
    assert final_bytes(out) == final_bytes(whole)
    assert all(np.isfinite(value) for value in loss_curve(whole).values())
    if mode == "wan21-i2v":
        with pytest.raises(UserError, match="one transformer and no boundary"):
            finetune(model, shards, tmp_path / "low", "--boundary-type", "low")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("--timestep-sampling", "uniform"), ("--timestep_sampling", "logit_normal")),
        (("--flow-shift", "12"), ("--flow-shift", "3")),
        (("--boundary-type", "low"), ("--boundary-type", "full")),
        (
            ("--timestep-sampling", "logit-normal", "--logit-mean", "0"),
            ("--timestep-sampling", "logit-normal", "--logit-mean", "1"),
        ),
        (
            ("--timestep-sampling", "logit-normal", "--logit-std", "1"),
            ("--timestep-sampling", "logit-normal", "--logit-std", "2"),
        ),
        (("--uniform-sampling",), ("--no-uniform-sampling",)),
        (("--learning-rate", "1e-3"), ("--learning-rate", "1e-4")),
        (("--seed", "1"), ("--seed", "2")),
        (("--caption-dropout", "0"), ("--caption-dropout", "1")),
        (("--target-name", "q"), ("--target-name", "k")),
        (("--lr-warmup-steps", "0"), ("--lr-warmup-steps", "5")),
    ],
    ids=lambda more: more[0],
)
def test_every_option_counts(
    one: tuple[str, ...], other: tuple[str, ...], tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    files = [
        load_file(
            finetune(tiny_t2v, t2v_shards, tmp_path / name, "--max-train-steps", "1", *more)
            / "checkpoint-1"
            / "lora_weights.safetensors"
        )
        for name, more in (("one", one), ("other", other))
    ]
    differing = files[0].keys() != files[1].keys() or any(
        not torch.equal(files[0][name], files[1][name]) for name in files[0]
    )
    assert differing


def test_defaults_are_those_of_a_distillation_but_for_the_rate(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    common = ["--model", str(tiny_t2v), "--shards", str(t2v_shards), "--output-dir", out]
    common += ["--boundary-type", "low"]
    shown = []
    for command in ("lora", "distill"):
        wantrain([command, *common, "--dry-run"], standalone_mode=False)
        printed = capsys.readouterr().out
        shown.append(json.loads(printed[: printed.rindex("}") + 1]))
        if command == "lora":
            assert "timesteps 0.0 to 875.0, uniform before the shift of 12" in printed
            assert "100 epochs: " in printed and " generator" not in printed
    plain, distilled = shown
    alike = plain.keys() & distilled.keys()
    assert {name for name in alike if plain[name] != distilled[name]} == {"learning_rate"}
    assert plain["learning_rate"] == 1e-4
    assert plain.keys() - alike == {
        "timestep_sampling", "logit_mean", "logit_std", "holdout", "holdout_steps",
    }  # fmt: skip
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--logit-mean", "1"), "--logit-mean: found 1 with --timestep-sampling uniform"),
        (("--logit-std", "2"), "--logit-std: found 2 with --timestep-sampling uniform"),
        (("--timestep-sampling", "logit-normal", "--logit-std", "0"), "--logit-std: found 0"),
        (("--timestep-sampling", "logit-normal", "--logit-mean", "nan"), "--logit-mean: found nan"),
        (("--timestep-sampling", "logit-normal", "--logit-mean", "80"), "outside of t 0 to 875"),
        (("--flow-shift", "-1"), "--flow-shift: found -1"),
        (("--tail", "drop", "--train-batch-size", "50"), "no full batch of 50"),
        (("--captions", "other"), "other"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        finetune(tiny_t2v, t2v_shards, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_shards_of_another_model_are_refused(
    t2v_shards: Path, tiny_i2v: Path, tiny_ti2v: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="without the conditions that an i2v model needs"):
        finetune(tiny_i2v, t2v_shards, tmp_path / "out")
    with pytest.raises(UserError, match="were encoded with another model"):
        finetune(tiny_ti2v, t2v_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_captions_alone_are_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    entry = {"text": "waves of kind 0, moving", "width": 96, "height": 54}
    shards = encode_list(tiny_t2v, tmp_path / "shards", [entry])
    with pytest.raises(UserError, match=r"1 of the 1 samples in .*which `wantrain lora` needs"):
        finetune(tiny_t2v, shards, tmp_path / "out", "--boundary-type", "high")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_distillation_is_refused(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = distill(
        tiny_t2v, t2v_shards, tmp_path, "--max-train-steps", "1", "--mixed-precision", "no"
    )
    with pytest.raises(UserError, match="method: checkpoint has 'distill', this run 'lora'"):
        finetune(tiny_t2v, t2v_shards, out, "--resume-from-checkpoint", "latest")
