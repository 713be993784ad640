"""`wantrain distill --method regression`, and `--start states`, as a user runs them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.cli.config_command import configuration
from shared.errors import UserError
from tests.train.conftest import encode
from tests.train.data.test_caption_only import encode_list
from tests.train.synthesised import timesteps, with_states
from tests.train.test_distill import arguments, distill, final_bytes, losses
from train.cli.app import app as wantrain
from train.prepare import prepare_distillation
from train.run import estimate
from train.saving.provenance import read_provenance

REGRESSION = ("--method", "regression", "--mixed-precision", "no")


def regress(model: Path, shards: Path, out: Path, *more: str) -> Path:
    """As `distill` of these tests, without what regression refuses."""
    words = arguments(model, shards, out, *REGRESSION, *more)
    for name in ("--learning-rate-critic", "--gen-update-interval"):
        at = words.index(name)
        del words[at : at + 2]
    wantrain(words, standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def shards(t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With states at the timesteps of the t2v model's schedule."""
    return with_states(t2v_shards, tmp_path_factory.mktemp("states") / "shards", timesteps(12))


AVERAGED = ("--ema-decay", "0.75", "--ema-start", "1", "--gradient-accumulation-steps", "2")


@pytest.fixture(scope="module")
def finished(tiny_t2v: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates of the high expert, averaged, not interrupted."""
    out = tmp_path_factory.mktemp("finished") / "out"
    more = ("--boundary-type", "high", "--max-train-steps", "4", *AVERAGED)
    return regress(tiny_t2v, shards, out, *more)


def test_the_student_alone_is_trained_and_its_files_say_how_to_sample(finished: Path) -> None:
    assert [step for step, _ in losses(finished)["generator"]] == [1, 2, 3, 4]
    assert sorted(path.name for path in (finished / "checkpoint-4").iterdir()) == [
        "generator_ema.safetensors",
        "generator_optimizer.safetensors",
        "generator_weights.safetensors",
        "state.json",
    ]
    weights = load_file(finished / "checkpoint-4" / "generator_weights.safetensors")
    assert all(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)
    for file in final_bytes(finished):
        told = read_provenance(finished / file)
        assert (told.method, told.expert, told.pairing) == ("distill", "high", "euler")
        assert told.denoising_step_indices_list == (1000.0, 750.0, 500.0, 250.0)
        assert told.recipe["method"] == "regression" and told.updates == 4
        assert told.cache["fingerprint"]["synthesis"]["steps"] == 40
        assert "sampler Euler" in told.metadata()["modelspec.usage_hint"]


@pytest.mark.parametrize(("at", "workers"), [(1, "2"), (3, "0")])
def test_resumed_equals_uninterrupted(
    finished: Path, tiny_t2v: Path, shards: Path, tmp_path: Path, at: int, workers: str
) -> None:
    common = ("--boundary-type", "high", *AVERAGED)
    out = regress(tiny_t2v, shards, tmp_path / "out", "--max-train-steps", str(at), *common)
    regress(
        tiny_t2v, shards, out, "--max-train-steps", "4", *common,
        "--resume-from-checkpoint", "latest", "--dataloader-num-workers", workers,
    )  # fmt: skip
    assert final_bytes(out) == final_bytes(finished)
    assert losses(out) == losses(finished)
    for file in (finished / "checkpoint-4").glob("*.safetensors"):
        assert file.read_bytes() == (out / "checkpoint-4" / file.name).read_bytes()


def test_a_checkpoint_of_dmd_is_another_run(
    finished: Path, tiny_t2v: Path, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"recipe.method: checkpoint has 'regression', this run"):
        distill(
            tiny_t2v, shards, finished, "--boundary-type", "high", "--max-train-steps", "9",
            "--mixed-precision", "no", "--resume-from-checkpoint", "latest",
        )  # fmt: skip


def test_the_path_is_learned_by_heart(tiny_t2v: Path, shards: Path, tmp_path: Path) -> None:
    out = regress(
        tiny_t2v, shards, tmp_path, "--max-train-steps", "60", "--learning-rate", "1e-2",
        "--max-grad-norm", "1", "--no-gradient-checkpointing",
    )  # fmt: skip
    curve = [loss for _, loss in losses(out)["generator"]]
    assert sum(curve[-20:]) / 20 < 0.8 * sum(curve[:10]) / 10


def test_a_warm_start_of_dmd(
    finished: Path, tiny_t2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--init-lora; where the steps would then lead on otherwise, it is said."""
    common = (
        "--boundary-type", "high", "--max-train-steps", "1", "--mixed-precision", "no",
        "--init-lora", str(finished / "lora-high-diffusers.safetensors"),
    )  # fmt: skip
    distill(tiny_t2v, shards, tmp_path / "euler", *common, "--pairing", "euler")
    assert "pairing" not in (said := capsys.readouterr().err) and "start " in said
    distill(tiny_t2v, shards, tmp_path / "renoise", *common)
    assert "--pairing euler" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [pytest.param("i2v", marks=pytest.mark.long), "ti2v"])
def test_other_models_in_bf16(
    mode: str, dataset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{mode}")
    plain = encode(dataset, model, tmp_path / "plain")
    shards = with_states(plain, tmp_path / "shards", timesteps(5), clean_first=mode == "ti2v")
    more = ("--mixed-precision", "bf16", "--random-frame-crop", "--caption-dropout", "0")
    whole = regress(model, shards, tmp_path / "whole", "--max-train-steps", "3", *more)
    out = regress(model, shards, tmp_path / "out", "--max-train-steps", "1", *more)
    regress(
        model, shards, out, "--max-train-steps", "3", "--resume-from-checkpoint", "latest", *more
    )
    assert final_bytes(out) == final_bytes(whole)
    if mode == "ti2v":
        with pytest.raises(UserError, match=r"--train-mode: normal, but .* its first frame"):
            regress(
                model, shards, tmp_path / "t2v", "--train-mode", "normal", "--max-train-steps", "6"
            )


@pytest.mark.parametrize(
    "more",
    [
        ("--learning-rate-critic", "1e-3"),
        ("--gen-update-interval", "3"),
        ("--pairing", "euler", "--fm-loss-weight", "1"),
        ("--start", "states"),
        ("--match", "handover"),
        ("--recipe", "seed"),
    ],
)
def test_options_that_regression_has_no_use_for(
    more: tuple[str, ...], tiny_t2v: Path, shards: Path, tmp_path: Path
) -> None:
    words = ["distill", "--model", str(tiny_t2v), "--shards", str(shards), *REGRESSION, *more]
    with pytest.raises(UserError, match=rf"{more[-2]}: found .* with --method regression"):
        configuration(wantrain, words)


def test_states_of_other_timesteps_are_refused(
    tiny_t2v: Path, t2v_shards: Path, shards: Path, tmp_path: Path
) -> None:
    cure = r"wantrain synthesize --states '1000 750 500 250' --flow-shift 5 --shards "
    for other, found in (
        (t2v_shards, "no states of a sampler"),
        (shards, "1000.0, 973.0, 923.1, 800.0"),
    ):
        more = ("--flow-shift", "5", "--dry-run")
        expected = r"expected the run's timesteps 1000.0, 937.5, 833.3, 625.0\. "
        with pytest.raises(UserError, match=rf"--method regression: .*{found}, {expected}.*{cure}"):
            regress(tiny_t2v, other, tmp_path, *more)
        with pytest.raises(UserError, match=rf"--start states: .*{found}, {expected}.*{cure}"):
            distill(tiny_t2v, other, tmp_path, "--start", "states", *more)
    with pytest.raises(UserError, match=r"--start: found states with --boundary-type high"):
        distill(tiny_t2v, shards, tmp_path, "--start", "states", "--boundary-type", "high")
    with pytest.raises(UserError, match="no step belongs to this expert"):
        regress(tiny_t2v, shards, tmp_path, "--denoising-step-indices-list", "1000,750,500")
    with pytest.raises(UserError, match=r"--recipe: found seed with --start states"):
        distill(tiny_t2v, shards, tmp_path, "--start", "states", "--recipe", "seed")


def test_captions_without_clips_have_no_path(tiny_t2v: Path, tmp_path: Path) -> None:
    entry: dict[str, object] = {"text": "waves", "width": 96, "height": 54}
    alone = encode_list(tiny_t2v, tmp_path / "alone", [entry])
    with pytest.raises(UserError, match=r"--method regression: .* text-only.*synthesize --states"):
        regress(tiny_t2v, alone, tmp_path / "out")
    with pytest.raises(UserError, match=r"--start: states, but .* text-only"):
        distill(tiny_t2v, alone, tmp_path / "out", "--start", "states")


def test_no_memory_is_planned_for_a_critic(
    tiny_t2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "--model", str(tiny_t2v), "--shards", str(shards), "--device", "cpu"]
    sums = []
    for more in ((), REGRESSION[:2]):
        needed = estimate(prepare_distillation(configuration(wantrain, [*words, *more])))  # type: ignore[arg-type]
        assert needed is not None
        sums.append(needed.parts)
    dmd, regression = sums
    assert dmd["LoRAs"] == 2 * regression["LoRAs"] > 0
    assert dmd["optimizers"] == 2 * regression["optimizers"] > 0
    capsys.readouterr()
    planned = {}
    for method in ("regression", "lora", "distill"):
        wantrain(
            [
                "plan", "--model", str(tiny_t2v), "--method", method, "--json",
                "--fix-sample-size", "64", "96", "--frames", "9",
            ],
            standalone_mode=False,
        )  # fmt: skip
        planned[method] = json.loads(capsys.readouterr().out)["parts"]
    assert planned["regression"] == planned["lora"] != planned["distill"]


@pytest.fixture
def prompts(dataset: Path, tiny_t2v: Path, tmp_path: Path) -> Path:
    """A cache with two validation prompts."""
    (tmp_path / "p.txt").write_text("waves --w 48 --h 32 --f 5\nno waves --w 32 --h 64 --f 9\n")
    more = ("--validation-prompts", str(tmp_path / "p.txt"), "--dtype", "fp32")
    return encode(dataset, tiny_t2v, tmp_path / "prompts", *more)


def test_validation_begins_as_the_expert_does(
    tiny_t2v: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    """high from noise by the prompts, low from cached states; training goes on as without."""
    shards = with_states(prompts, tmp_path / "shards", timesteps(12))
    for expert, clips in (("high", 2), ("low", 2)):
        more = ("--boundary-type", expert, "--max-train-steps", "2")
        plain = regress(tiny_t2v, shards, tmp_path / f"{expert}-plain", *more)
        out = regress(tiny_t2v, shards, tmp_path / expert, *more, "--validation-steps", "1")
        assert final_bytes(plain) == final_bytes(out)
        first, last = (
            [load_file(path)["latents"] for path in sorted(folder.glob("*.safetensors"))]
            for folder in (out / "validation" / "step-0", out / "validation" / "step-2")
        )
        assert len(first) == len(last) == clips
        assert all(torch.isfinite(clip).all() for clip in last)
        assert not torch.equal(first[0], last[0])


def test_dmd_from_states_resumes_exactly(tiny_t2v: Path, shards: Path, tmp_path: Path) -> None:
    common = (
        "--start", "states", "--mixed-precision", "bf16", "--gradient-accumulation-steps", "2",
        "--dataloader-num-workers", "2", "--validation-steps", "2",
    )  # fmt: skip
    whole = distill(tiny_t2v, shards, tmp_path / "whole", "--max-train-steps", "2", *common)
    out = distill(tiny_t2v, shards, tmp_path / "out", "--max-train-steps", "1", *common)
    distill(
        tiny_t2v, shards, out, "--max-train-steps", "2", "--resume-from-checkpoint", "latest",
        *common,
    )  # fmt: skip
    assert final_bytes(out) == final_bytes(whole)
    assert losses(out) == losses(whole)
    latents = distill(
        tiny_t2v, shards, tmp_path / "latents", "--max-train-steps", "2", *common, "--start",
        "latents",
    )  # fmt: skip
    assert final_bytes(latents) != final_bytes(whole)
    with pytest.raises(UserError, match=r"start: checkpoint has 'states', this run 'latents'"):
        distill(
            tiny_t2v, shards, out, "--max-train-steps", "3", "--resume-from-checkpoint", "latest",
            *common, "--start", "latents",
        )  # fmt: skip
