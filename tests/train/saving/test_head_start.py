"""--critic-warmup: order, names, lengths, rates, and stopped anywhere the same end."""

import io
import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from tests.train.methods.test_updates import config_of
from tests.train.saving.test_resume import assert_the_same, stop_in
from tests.train.test_distill import arguments, distill, losses
from train.cli.app import app as wantrain
from train.prepare import prepare_distillation as prepare
from train.saving.checkpoint import list_checkpoints
from train.tracking.progress import TrainProgress

# Critic 1 to 4; critic 5, 6, generator 7; critic 8, 9, generator 10.
RUN = (
    "--critic-warmup", "4", "--max-train-steps", "2", "--mixed-precision", "no",
    "--train-batch-size", "1", "--checkpointing-steps", "1", "--ema-decay", "0.5",
    "--ema-start", "1", "--lr-scheduler", "warmup_stable_decay", "--exits", "last",
    "--score-levels", "exit",
)  # fmt: skip
RESUME = ("--resume-from-checkpoint", "latest")
NAMES = ["0+1", "0+2", "0+3", "0+4", "0+5", "0+6", "1", "1+1", "1+2", "2"]


@pytest.fixture(scope="module")
def whole(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_t2v, t2v_shards, tmp_path_factory.mktemp("whole") / "out", *RUN)


def test_order_checkpoints_and_rates(whole: Path) -> None:
    curves = losses(whole)
    assert [step for step, _ in curves["generator"]] == [7, 10]
    assert [step for step, _ in curves["critic"]] == [1, 2, 3, 4, 5, 6, 8, 9]
    assert [path.name for path in list_checkpoints(whole)] == ["checkpoint-1", "checkpoint-2"]
    state = json.loads((whole / "checkpoint-1" / "state.json").read_text())
    assert (state["updates"], state["product"]["updates"]) == (7, 1)
    assert state["identity"]["recipe"]["critic_warmup"] == 4
    events = EventAccumulator(str(whole / "logs"))
    events.Reload()
    for role, rate, count in (("generator", 1e-3, 2), ("critic", 2e-3, 8)):
        logged = [event.value for event in events.Scalars(f"learning_rate/{role}")]
        assert logged == pytest.approx([rate * min(1, 2 * (1 - n / count)) for n in range(count)])


@pytest.mark.parametrize("done", [1, 3, 4, 5, 6, 7, 9])
def test_stopped_after_any_update(
    done: int, whole: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, done + 1)
        with pytest.raises(SystemExit) as ended:
            wantrain(arguments(tiny_t2v, t2v_shards, out, *RUN), standalone_mode=False)
    assert ended.value.code == 128 + signal.SIGTERM
    assert list_checkpoints(out)[-1].name == f"checkpoint-{NAMES[done - 1]}"
    distill(tiny_t2v, t2v_shards, out, *RUN, *RESUME)
    assert_the_same(out, whole)


def test_a_checkpoint_without_one_is_of_another_run(
    whole: Path, tiny_t2v: Path, t2v_shards: Path
) -> None:
    with pytest.raises(UserError) as refused:
        distill(tiny_t2v, t2v_shards, whole, *RUN[2:], *RESUME, "--exits", "all")
    assert "critic_warmup: checkpoint has 4, this run None" in str(refused.value)
    assert "exits: checkpoint has 'last', this run None" in str(refused.value)


@pytest.mark.parametrize(
    ("ahead", "epochs", "steps"), [(0, 6, 8), (1, 6, 7), (4, 6, 6), (21, 6, 1)]
)
def test_epochs_count_it(
    ahead: int, epochs: int, steps: int, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Four updates an epoch: as many whole cycles of three as come after it."""
    words = ("--critic-warmup", str(ahead), "--num-train-epochs", str(epochs))
    run = prepare(config_of(tiny_t2v, t2v_shards, tmp_path, *words))
    assert epochs * run.plan.batches_per_epoch == 24
    assert (run.steps, run.updates) == (steps, ahead + 3 * steps)
    with pytest.raises(UserError, match="24 updates, fewer than 22 critic updates and one cycle"):
        prepare(config_of(tiny_t2v, t2v_shards, tmp_path, *words[2:], "--critic-warmup", "22"))


def test_progress_begins_with_the_first_cycle() -> None:
    console = Console(file=io.StringIO())
    for start, shown in ((0, 0), (3, 0), (4, 0), (6, 0), (7, 1), (9, 1), (10, 2)):
        progress = TrainProgress(
            2, 3, console, head_start=4, title="distill", start=start, device=torch.device("cpu")
        )
        assert progress.tasks[0].completed == shown
        progress.step("critic", 1.0, start, {}, seconds=1.0, samples=1, peak=0)
        assert progress.tasks[0].completed == pytest.approx(max(0, start - 4) / 3)
