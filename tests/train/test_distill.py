"""`wantrain distill` as a user runs it: what it moves, leaves behind, refuses, and resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from shared.format.cache import open_cache
from shared.io.store import Store
from tests.models import one_expert, tiny_model
from train.cli.app import app as wantrain
from train.saving.lora_formats import FORMS

WANTRAIN = str(Path(sys.executable).parent / "wantrain")
SMALL = (
    "--rank", "4", "--network-alpha", "3", "--learning-rate", "1e-3",
    "--learning-rate-critic", "2e-3", "--dataloader-num-workers", "0",
    "--gen-update-interval", "2", "--train-batch-size", "2", "--device", "cpu",
)  # fmt: skip


def arguments(model: Path, shards: Path, out: Path, *more: str) -> list[str]:
    return [
        "distill", "--model", str(model), "--shards", str(shards), "--output-dir", str(out),
        *SMALL, *one_expert(model), *more,
    ]  # fmt: skip


def distill(model: Path, shards: Path, out: Path, *more: str) -> Path:
    wantrain(arguments(model, shards, out, *more), standalone_mode=False)
    return out


def losses(out: Path, name: str = "loss") -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's loss curves, or others; of a step written twice, the last counts.

    File by file: of several that one second brought forth, a folder's reader drops some.
    """
    curves: dict[str, dict[int, float]] = {"generator": {}, "critic": {}}
    for file in sorted((out / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file))
        events.Reload()
        for role, curve in curves.items():
            if f"{name}/{role}" in events.Tags()["scalars"]:
                curve.update({e.step: e.value for e in events.Scalars(f"{name}/{role}")})
    return {role: sorted(curve.items()) for role, curve in curves.items()}


def final_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("lora-*.safetensors"))}


@pytest.fixture(scope="module")
def finished(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 4 generator and 8 critic updates, the low expert, fp32."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return distill(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "4", "--mixed-precision", "no",
        "--gradient-accumulation-steps", "2",
    )  # fmt: skip


def test_both_roles_train_and_every_file_is_there(finished: Path) -> None:
    curves = losses(finished)
    assert [step for step, _ in curves["generator"]] == [3, 6, 9, 12]
    assert [step for step, _ in curves["critic"]] == [1, 2, 4, 5, 7, 8, 10, 11]
    assert sorted(final_bytes(finished)) == [
        "lora-low-comfyui.safetensors",
        "lora-low-diffusers.safetensors",
        "lora-low-kohya.safetensors",
    ]
    state = json.loads((finished / "checkpoint-4" / "state.json").read_text())
    assert state["updates"] == 12
    assert {file.suffix for file in (finished / "checkpoint-4").iterdir()} == {
        ".json",
        ".safetensors",
    }
    weights = load_file(finished / "checkpoint-4" / "generator_weights.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)


def test_another_seed_gives_another_lora(
    finished: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    other = distill(
        tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1", "--mixed-precision", "no",
        "--seed", "43",
    )  # fmt: skip
    assert final_bytes(other) != final_bytes(finished)


def test_resumed_in_the_middle_equals_uninterrupted(
    finished: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    common = ("--mixed-precision", "no", "--gradient-accumulation-steps", "2")
    out = tmp_path / "out"
    distill(tiny_t2v, t2v_shards, out, "--max-train-steps", "2", *common)
    distill(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "4", *common,
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert losses(out) == losses(finished)
    assert final_bytes(out) == final_bytes(finished)
    for file in (finished / "checkpoint-4").glob("*.safetensors"):
        assert file.read_bytes() == (out / "checkpoint-4" / file.name).read_bytes()


def _logged(out: Path) -> int:
    """The last update whose critic loss is in TensorBoard's file, 0 before the first."""
    if not (out / "logs").exists():
        return 0
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return max(e.step for e in events.Scalars("loss/critic")) if "loss/critic" in tags else 0


def _stopped_run(command: list[str], out: Path, updates: int) -> subprocess.CompletedProcess[str]:
    """Start the real command, SIGTERM it once `updates` are logged, wait for its end."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if _logged(out) >= updates:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    _, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, "", errors)


def test_sigterm_leaves_a_checkpoint_and_the_resumed_run_equals_an_uninterrupted_one(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    """bf16, two workers, i2v, the high expert; stopped wherever the signal meets it."""
    common = (
        "--mixed-precision", "bf16", "--boundary-type", "high", "--dataloader-num-workers", "2",
        "--gen-update-interval", "4",
    )  # fmt: skip
    whole = distill(tiny_i2v, i2v_shards, tmp_path / "whole", *common, "--max-train-steps", "12")
    out = tmp_path / "out"
    command = [WANTRAIN, *arguments(tiny_i2v, i2v_shards, out, *common, "--max-train-steps", "12")]
    stopped = _stopped_run(command, out, updates=7)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "--resume-from-checkpoint latest" in stopped.stderr
    (checkpoint,) = out.glob("checkpoint-*")
    updates = json.loads((checkpoint / "state.json").read_text())["updates"]
    assert 7 <= updates < 60
    assert len(final_bytes(out)) == len(FORMS)

    subprocess.run(
        [*command, "--resume-from-checkpoint", "latest"], check=True, capture_output=True
    )
    assert final_bytes(out) == final_bytes(whole)
    assert losses(out) == losses(whole)


def test_epochs_give_the_length(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6 samples in 3 buckets at batch 2 are 4 updates an epoch: 2+1, 2, 1 samples."""
    distill(tiny_t2v, t2v_shards, tmp_path, "--num-train-epochs", "5", "--dry-run")
    printed = capsys.readouterr().out
    assert '"boundary_type": "low"' in printed and '"flow_shift": 12.0' in printed
    per_epoch = int(printed.split(" updates an epoch")[0].split()[-1])
    assert f"5 epochs: {5 * per_epoch // 3} generator updates" in printed
    assert not (tmp_path / "logs").exists()


def test_an_old_run_is_not_overwritten(finished: Path, tiny_t2v: Path, t2v_shards: Path) -> None:
    before = final_bytes(finished)
    with pytest.raises(UserError, match=r"already holds checkpoint-4 .*--resume-from-checkpoint"):
        distill(tiny_t2v, t2v_shards, finished, "--max-train-steps", "1")
    assert final_bytes(finished) == before


def _resume_copy(
    finished: Path, out: Path, model: Path, shards: Path, *more: str, damage: str = ""
) -> None:
    shutil.copytree(finished, out)
    if damage:
        file = out / "checkpoint-4" / damage
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    distill(
        model, shards, out, "--max-train-steps", "5", "--mixed-precision", "no",
        "--gradient-accumulation-steps", "2", "--resume-from-checkpoint", "latest", *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rank", "6"), r"lora\.rank: checkpoint has 4, this run 6"),
        (("--target-name", "q,k"), r"lora\.targets: checkpoint has .*ffn"),
        (("--boundary-type", "high"), r"recipe\.boundary_type: checkpoint has 'low', .*'high'"),
        (("--flow-shift", "7"), r"recipe\.flow_shift: checkpoint has 12\.0, this run 7\.0"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    finished: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, more: tuple[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _resume_copy(finished, tmp_path / "out", tiny_t2v, t2v_shards, *more)


@pytest.mark.parametrize(
    "file", ["generator_weights.safetensors", "critic_optimizer.safetensors", "state.json"]
)
def test_damaged_checkpoint_is_named(
    finished: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, file: str
) -> None:
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: (generator_|critic_|state)"):
        _resume_copy(finished, tmp_path / "out", tiny_t2v, t2v_shards, damage=file)


def test_latest_skips_a_damaged_checkpoint_and_names_it(
    finished: Path,
    tiny_t2v: Path,
    t2v_shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    common = ("--mixed-precision", "no", "--gradient-accumulation-steps", "2")
    out = tmp_path / "out"
    distill(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "3", *common, "--checkpointing-steps", "1"
    )
    damaged = out / "checkpoint-3" / "critic_weights.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    distill(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "4", *common,
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    said = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-3 is damaged: critic_weights.safetensors has SHA-256" in said
    assert "from" in said and "checkpoint-2 at update 6" in said
    assert final_bytes(out) == final_bytes(finished)
    assert (out / "checkpoint-3.aside").exists()


def test_only_the_newest_checkpoints_are_kept(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoint-0.removed").mkdir(parents=True)  # a kill left it
    out = distill(
        tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "5", "--checkpointing-steps",
        "2", "--checkpoints-total-limit", "2",
    )  # fmt: skip
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


def test_shards_of_another_model_are_refused_with_both_values(
    t2v_shards: Path, i2v_shards: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", "t2v", seed=5)
    with pytest.raises(UserError, match=r"latents\.vae: shards have '\w+', expected '\w+'"):
        distill(other, t2v_shards, tmp_path / "a")
    config = json.loads((other / "vae" / "config.json").read_text())
    config["latents_mean"][3] = 0.25
    (other / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"latents\.mean: shards have \[.*\], expected \[.*0\.25"):
        distill(other, t2v_shards, tmp_path / "b")
    with pytest.raises(
        UserError, match=r"without the conditions.*i2v model.*wanprep add-condition"
    ):
        distill(
            _with_encoders_of(tiny_t2v, tiny_i2v, tmp_path / "mixed"), t2v_shards, tmp_path / "c"
        )


def _with_encoders_of(encoders: Path, transformers: Path, folder: Path) -> Path:
    shutil.copytree(transformers, folder)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        shutil.copytree(encoders / part, folder / part)
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target-name", " "), "--target-name: found"),
        (("--flow-shift", "0"), "--flow-shift: found 0"),
        (("--flow-shift", "nan"), "--flow-shift: found nan"),
        (("--adam-epsilon", "-1"), "--adam-epsilon: found -1"),
        (("--denoising-step-indices-list", "990,980"), "no step belongs to this expert"),
        (("--num-train-epochs", "1", "--gen-update-interval", "99"), "fewer than one cycle"),
        (("--tail", "drop", "--train-batch-size", "50"), "no full batch of 50"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_damaged_base_is_named(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_t2v, model)
    weights = model / "transformer_2" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file({n: t for n, t in whole.items() if "blocks.1." not in n}, weights, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"transformer_2/\S+ lacks \d+ weights, the first blocks\.1\."
    ):
        distill(model, t2v_shards, tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:3])
    with pytest.raises(UserError, match=r"cannot read .*transformer_2/"):
        distill(model, t2v_shards, tmp_path / "out")
    weights.unlink()
    with pytest.raises(UserError, match=r"transformer_2 holds no safetensors"):
        distill(model, t2v_shards, tmp_path / "out")


def test_seed_spelling_with_underscores(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wantrain(
        [
            "distill", f"--pretrained_model_name_or_path={tiny_t2v}", f"--shards={t2v_shards}",
            f"--output_dir={tmp_path}", "--learning_rate_critic=3e-06", "--network_alpha=32",
            "--target_name=q,k,v,ffn.0,ffn.2", "--gradient_checkpointing", "--boundary_type=high",
            "--dry_run",
        ],
        standalone_mode=False,
    )  # fmt: skip
    assert '"learning_rate_critic": 3e-06' in capsys.readouterr().out


LEAN = """
import gc, sys, torch
from train.cli.app import app
import train.tracking.progress as progress

seen = []
step = progress.TrainProgress.step

def look_and_step(self, *args, **more):
    seen.append({type(o).__name__ for o in gc.get_objects() if isinstance(o, torch.nn.Module)})
    return step(self, *args, **more)

progress.TrainProgress.step = look_and_step
app(sys.argv[1:], standalone_mode=False)
assert len(seen) == 3, len(seen)
names = set().union(*seen)
assert "WanTransformer3DModel" in names
encoders = ("Autoencoder", "T5", "CLIP", "WanEncoder", "WanDecoder")
bad = [name for name in names if any(part in name for part in encoders)]
assert not bad, bad
never = ("autoencoder_kl_wan", "modeling_umt5", "modeling_clip")
modules = [
    m for m in sys.modules if m.split(".")[0] in ("decord", "preprocess") or m.endswith(never)
]
assert not modules, modules
"""


def test_a_run_builds_no_encoder(tiny_i2v: Path, i2v_shards: Path, tmp_path: Path) -> None:
    """Looked at from inside a real run, at every step, in live modules and in sys.modules."""
    more = ("--validation-steps", "1", "--report-to", "tensorboard,csv")
    command = arguments(tiny_i2v, i2v_shards, tmp_path / "out", "--max-train-steps", "1", *more)
    subprocess.run(
        [sys.executable, "-c", LEAN, *command], check=True, env=os.environ, capture_output=True
    )


def test_lora_files_carry_their_training(finished: Path, t2v_shards: Path) -> None:
    for form in FORMS:
        with safe_open(finished / f"lora-low-{form}.safetensors", framework="pt") as file:
            metadata = file.metadata()
        told = json.loads(metadata["wandistill"])
        manifest = json.loads((t2v_shards / "manifest.json").read_text())
        assert told["cache"]["fingerprint"] == manifest["fingerprint"]
        assert told["cache"]["digest"] == open_cache(Store(t2v_shards)).digest
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "3")
        assert (metadata["ss_steps"], metadata["ss_learning_rate"]) == ("4", "0.001")
        assert metadata["modelspec.timestep_range"] == "0,875"
        assert (told["expert"], told["rank"], told["alpha"]) == ("low", 4, 3.0)
        assert told["flow_shift"] == 12.0
        assert told["updates"] == 4
