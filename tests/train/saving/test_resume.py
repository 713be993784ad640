"""Stopped anywhere and gone on: the losses, the LoRA and the checkpoint of a run left in peace."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.distributed.test_faults import LOSSES, RESUME, RUN
from tests.train.test_distill import WANTRAIN, arguments, distill, final_bytes, losses
from train.cli.app import app as wantrain
from train.saving.checkpoint import find_checkpoint, list_checkpoints

MICRO_STEPS = 12  # six updates (critic, critic, generator, twice) of two each


def workers(number: int) -> tuple[str, str]:
    return ("--dataloader-num-workers", str(number))


@pytest.fixture(scope="module")
def whole(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    return distill(tiny_t2v, t2v_shards, tmp_path_factory.mktemp("whole") / "out", *RUN)


def stop_in(patch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM inside the `step`-th micro-step from now, of either role, before its backward."""
    count = 0
    for name, module in LOSSES.items():
        real = getattr(module, name)

        def struck(*args: object, real=real) -> object:  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        patch.setattr(module, name, struck)


def assert_the_same(out: Path, whole: Path) -> None:
    assert losses(out) == losses(whole)
    assert final_bytes(out) == final_bytes(whole) and final_bytes(out)
    for file in (whole / "checkpoint-2").glob("*.safetensors"):
        assert file.read_bytes() == (out / "checkpoint-2" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("step", range(1, MICRO_STEPS + 1))
def test_stopped_in_any_micro_step(
    step: int, number: int, whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Even steps are in the middle of an accumulation, 3 to 4 and 9 to 10 in a critic interval."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, step)
        with pytest.raises(SystemExit) as ended:
            wantrain(
                arguments(tiny_t2v, t2v_shards, out, *RUN, *workers(number)), standalone_mode=False
            )
    assert ended.value.code == 128 + signal.SIGTERM
    done = (step - 1) // 2
    generator, critic = divmod(done, 3)
    expected = [f"checkpoint-{generator}" + (f"+{critic}" if critic else "")] if done else []
    assert [path.name for path in list_checkpoints(out)] == expected
    distill(tiny_t2v, t2v_shards, out, *RUN, *RESUME, *workers(number))
    assert_the_same(out, whole)


def test_stopped_again_and_again_with_changing_workers(
    whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """One update and a half a start: six starts, each from what the one before left."""
    out = tmp_path / "out"
    for start in range(5):
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, 4)
            with pytest.raises(SystemExit):
                wantrain(
                    arguments(tiny_t2v, t2v_shards, out, *RUN, *RESUME, *workers(2 * (start % 2))),
                    standalone_mode=False,
                )
    distill(tiny_t2v, t2v_shards, out, *RUN, *RESUME)
    assert_the_same(out, whole)


LONG_RUN = ("--max-train-steps", "12", "--mixed-precision", "no", "--checkpointing-steps", "1")


@pytest.mark.long
def test_kill_9_at_random_times_loses_at_most_a_checkpoints_interval(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Real processes, killed once they have trained for a random time, until one gets to the end.

    Whatever a kill met, the newest whole checkpoint is at most one interval (a cycle of three
    updates) behind what was logged, and the end is that of a run left in peace.
    """
    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", *LONG_RUN)
    out, rng, kills = tmp_path / "out", random.Random(7), 0
    run = (*LONG_RUN, *RESUME, *workers(2))
    command = [WANTRAIN, *arguments(tiny_t2v, t2v_shards, out, *run)]
    for _ in range(6):
        before = len(list((out / "logs").iterdir())) if (out / "logs").exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:  # until this process has opened its log, which is the loop
            if (out / "logs").exists() and len(list((out / "logs").iterdir())) > before:
                time.sleep(rng.uniform(0, 0.5))
                process.kill()
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
        kills += process.returncode == -signal.SIGKILL
        logged = max((step for curve in losses(out).values() for step, _ in curve), default=0)
        latest = find_checkpoint(out, "latest")
        saved = 3 * int(latest.name.split("-")[1].split("+")[0]) if latest else 0
        assert logged - saved <= 3
    distill(tiny_t2v, t2v_shards, out, *run)
    assert kills >= 3
    assert final_bytes(out) == final_bytes(whole)
    assert losses(out) == losses(whole)
