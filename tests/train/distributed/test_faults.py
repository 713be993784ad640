"""Runs that fail in the middle: what is left, what is said, and that going on is exact."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.methods.dmd
import train.saving.checkpoint
from shared.errors import UserError
from tests.train.methods.test_updates import config_of
from tests.train.test_distill import arguments, distill, final_bytes
from train.cli.app import app as wantrain
from train.prepare import prepare_distillation as prepare
from train.saving.checkpoint import find_checkpoint, list_checkpoints

# Updates: critic 1, 2, generator 3; critic 4, 5, generator 6. Each of two micro-steps of one.
RUN = (
    "--max-train-steps", "2", "--mixed-precision", "no", "--train-batch-size", "1",
    "--gradient-accumulation-steps", "2",
)  # fmt: skip
RESUME = ("--resume-from-checkpoint", "latest")
Loss = Callable[..., torch.Tensor]
# Loss → the module that calls it.
LOSSES = {"regression_loss": train.methods.dmd, "dmd_loss": train.methods.dmd}


@pytest.fixture(scope="module")
def whole(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    return distill(tiny_t2v, t2v_shards, tmp_path_factory.mktemp("whole") / "out", *RUN)


def strike(
    patch: pytest.MonkeyPatch, name: str, call: int, fault: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Put the result of the `call`-th call (from 1) of a loss of distillation through `fault`."""
    real: Loss = getattr(LOSSES[name], name)
    calls = 0

    def struck(*args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(*args)
        return fault(loss) if calls == call else loss

    patch.setattr(LOSSES[name], name, struck)


def assert_goes_on_like(whole: Path, out: Path, model: Path, shards: Path) -> None:
    distill(model, shards, out, *RUN, *RESUME)
    assert final_bytes(out) == final_bytes(whole)
    for file in (whole / "checkpoint-2").glob("*.safetensors"):
        assert file.read_bytes() == (out / "checkpoint-2" / file.name).read_bytes(), file.name


def _nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def _infinite(loss: torch.Tensor) -> torch.Tensor:
    return loss + float("inf")


def _finite_loss_with_nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    return loss + (loss * 0).sqrt()  # 0 · ∞ backward


def _finite_loss_with_infinite_norm(loss: torch.Tensor) -> torch.Tensor:
    """Clipping by it would make every gradient 0, and the update one of weight decay alone."""
    loss.register_hook(lambda slope: slope * 1e38)
    return loss


@pytest.mark.parametrize(
    ("name", "call", "update", "left", "fault"),
    [
        ("regression_loss", 5, 4, "checkpoint-1", _nan),  # first micro-step of its update
        ("regression_loss", 8, 5, "checkpoint-1+1", _infinite),  # second one
        ("regression_loss", 8, 5, "checkpoint-1+1", _finite_loss_with_nan_gradient),
        ("regression_loss", 7, 5, "checkpoint-1+1", _finite_loss_with_infinite_norm),
        ("dmd_loss", 4, 6, "checkpoint-1+2", _finite_loss_with_infinite_norm),
        ("dmd_loss", 4, 6, "checkpoint-1+2", _nan),
        ("dmd_loss", 3, 6, "checkpoint-1+2", _finite_loss_with_nan_gradient),
    ],
)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, name: str, call: int,
    update: int, left: str, fault: Callable[[torch.Tensor], torch.Tensor],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    role = "critic" if name == "regression_loss" else "generator"
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, name, call, fault)
        with pytest.raises(UserError, match=rf"before update {update} touched.*: {role} ") as said:
            distill(tiny_t2v, t2v_shards, out, *RUN)
    run = prepare(config_of(tiny_t2v, t2v_shards, tmp_path / "none", *RUN))
    for row in run.plan.batch(update - 1):
        assert run.data.key(int(row)) in str(said.value)
    assert [path.name for path in list_checkpoints(out)] == [left]
    assert json.loads((out / left / "state.json").read_text())["updates"] == update - 1
    for file in [*(out / left).glob("*.safetensors"), *out.glob("lora-*")]:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values()), file
    assert_goes_on_like(whole, out, tiny_t2v, t2v_shards)


def test_a_bad_first_update_leaves_nothing_to_mistake_for_a_result(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strike(monkeypatch, "regression_loss", 1, _nan)
    with pytest.raises(UserError, match="before update 1 touched the weights: critic loss nan"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN)
    assert not list_checkpoints(tmp_path / "out") and not final_bytes(tmp_path / "out")


def _raise(loss: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("injected")


@pytest.mark.parametrize(
    ("name", "call", "left"),
    [("regression_loss", 6, "checkpoint-1"), ("regression_loss", 7, "checkpoint-1+1"),
     ("dmd_loss", 4, "checkpoint-1+2"), ("dmd_loss", 1, "checkpoint-0+2")],
)  # fmt: skip
def test_any_other_failure_keeps_the_last_whole_update(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, name: str, call: int, left: str
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, name, call, _raise)
        with pytest.raises(RuntimeError, match="injected"):
            distill(tiny_t2v, t2v_shards, out, *RUN)
    assert [path.name for path in list_checkpoints(out)] == [left]
    assert len(final_bytes(out)) == 3
    assert_goes_on_like(whole, out, tiny_t2v, t2v_shards)


def test_a_full_gpu_says_what_would_fit(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(loss: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    strike(monkeypatch, "regression_loss", 6, full)
    with pytest.raises(UserError) as said:
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN)
    message = str(said.value)
    assert message.startswith("--device: cpu is out of memory (OutOfMemoryError: CUDA out of memo")
    assert "By `wantrain plan` these options need" in message
    assert re.search("the same command with --.* --resume-from-checkpoint latest", message)
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]


FAILING = """
import sys, train.methods.dmd
from train.cli.app import main
calls = 0
def regression_loss(*_):
    global calls
    calls += 1
    if calls == 2:
        raise RuntimeError("injected")
    return real(*_)
real = train.methods.dmd.regression_loss
train.methods.dmd.regression_loss = regression_loss
main()
"""


def test_a_failing_run_with_workers_ends(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    """Threads that read ahead must not keep the process alive: the queue is far from its end."""
    out = tmp_path / "out"
    command = arguments(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "5000", "--dataloader-num-workers", "2"
    )
    ended = subprocess.run(
        [sys.executable, "-c", FAILING, *command], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and "RuntimeError: injected" in ended.stderr, ended.stderr
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-0+1"]


def test_a_second_signal_does_not_lose_the_final_save(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """SIGTERM in update 5, then at every fsync of the save that it caused: SIGTERM or SIGINT."""
    out, seen = tmp_path / "out", 0
    real = train.saving.checkpoint.fsync_file

    def kick(path: Path) -> None:
        nonlocal seen
        seen += 1
        os.kill(os.getpid(), signal.SIGINT if seen % 2 else signal.SIGTERM)
        real(path)

    def stop(loss: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.saving.checkpoint, "fsync_file", kick)
        strike(patch, "regression_loss", 7, stop)
        with pytest.raises(SystemExit) as ended:
            wantrain(arguments(tiny_t2v, t2v_shards, out, *RUN), standalone_mode=False)
    assert seen >= 5
    assert ended.value.code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1+1"]
    assert len(final_bytes(out)) == 3
    assert_goes_on_like(whole, out, tiny_t2v, t2v_shards)


def test_going_back_sets_later_checkpoints_aside(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN, "--checkpointing-steps", "1")
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    old = (out / "checkpoint-2" / "generator_weights.safetensors").read_bytes()
    for wanted in ("checkpoint-1", str(out / "checkpoint-1")):
        distill(
            tiny_t2v, t2v_shards, out, *RUN[2:], "--max-train-steps", "1",
            "--resume-from-checkpoint", wanted,
        )  # fmt: skip
        aside = out / "checkpoint-2.aside" / "generator_weights.safetensors"
        assert aside.read_bytes() == old
        assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1"]
    assert "set aside the later checkpoint-2" in capsys.readouterr().err
    assert find_checkpoint(out, "latest") == out / "checkpoint-1"
    assert_goes_on_like(whole, out, tiny_t2v, t2v_shards)


def test_checkpoint_of_another_base_is_refused(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """The same encoders, so the shards fit; one weight of the trained expert differs."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_t2v, model)
    shutil.copytree(whole, out)
    file = model / "transformer_2" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"model\.base: checkpoint has '\w+', this run '\w+'"):
        distill(model, t2v_shards, out, *RUN, *RESUME)


KILLED_RUN = """
import os, signal, sys
from train.cli.app import main
def hook(event, args):
    if event == "open" and str(args[0]).endswith("checkpoint-2.tmp/critic_weights.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
main()
"""


def test_a_run_killed_in_its_second_checkpoint_goes_on_from_the_first(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = arguments(tiny_t2v, t2v_shards, out, *RUN, "--checkpointing-steps", "1")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, *command], capture_output=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert (out / "checkpoint-2.tmp").is_dir() and not (out / "checkpoint-2").exists()
    assert find_checkpoint(out, "latest") == out / "checkpoint-1"
    assert_goes_on_like(whole, out, tiny_t2v, t2v_shards)
