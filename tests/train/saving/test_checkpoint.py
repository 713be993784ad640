"""A checkpoint appears whole or not at all: a real SIGKILL at every file operation of a save."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.saving.checkpoint
from shared.errors import UserError
from train.distributed.process_group import Ranks
from train.saving.checkpoint import (
    Files,
    Identity,
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from train.strategies.ddp import OptimizerRole

# Kill -9 at every file operation of a save: the audit hook comes before open, rename, rmdir …
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.saving.test_checkpoint import save, small_state

kinds = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
cases = [(int(updates), point) for updates in sys.argv[2:] for point in range(200)]
done = set()
for updates, point in cases:
    if updates in done:
        continue
    state, folder = small_state(9.0, updates), Path(sys.argv[1]) / f"{updates}-{point}"
    save(folder, small_state(1.0, 3))
    child = os.fork()
    if child == 0:
        left = point
        def count(event, args):
            global left
            if event in kinds:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
        sys.addaudithook(count)
        save(folder, state)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        done.add(updates)
"""
IDENTITY = Identity({"model": {"base": "b"}}, {"seed": 1})


def small_state(value: float, updates: int) -> TrainState:
    """Two roles of one weight each, with an optimizer that has stepped."""
    roles = {}
    for role in ("generator", "critic"):
        parameter = torch.nn.Parameter(torch.full((2, 2), value))
        optimizer = torch.optim.AdamW([parameter], lr=0.0, weight_decay=0.0)
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        roles[role] = OptimizerRole({"w": parameter}, optimizer, Ranks())
    return TrainState(roles, updates)


def save(folder: Path, state: TrainState) -> Path:
    steps, others = divmod(state.updates, 3)
    return save_checkpoint(
        folder, state.files(), state.updates, IDENTITY, steps=steps, others=others
    )


def weights_of(state: TrainState) -> Files:
    return {f"{name}_weights.safetensors": role.weights() for name, role in state.trained.items()}


def value_of(checkpoint: Path) -> float:
    """The weight in a checkpoint; UserError unless it is whole."""
    state = small_state(0.0, 0)
    loaded = load_checkpoint(checkpoint, weights_of(state), IDENTITY)
    state.load(loaded.files, loaded.updates)
    return state.trained["generator"].weights()["w"].mean().item()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "U-K": a whole checkpoint-1, then a save at U updates, killed at operation K."""
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", KILLED, str(root), "3", "6"], check=True, timeout=120)
    return root


def folders_of(killed: Path, copy: Path, updates: int) -> list[Path]:
    """A copy of the folders of one U, in the order of the operations."""
    shutil.copytree(killed, copy, dirs_exist_ok=True)
    folders = sorted(copy.glob(f"{updates}-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(folders) > 15  # five files, two folders, their fsyncs and renames
    return folders


def test_kill_9_at_any_point_of_a_save_leaves_whole_checkpoints(
    killed: Path, tmp_path: Path
) -> None:
    ends = []
    for folder in folders_of(killed, tmp_path, 6):
        values = {path.name: value_of(path) for path in list_checkpoints(folder)}
        assert values in ({"checkpoint-1": 1.0}, {"checkpoint-1": 1.0, "checkpoint-2": 9.0})
        latest = find_checkpoint(folder, "latest")
        assert latest is not None and latest.name == max(values)
        ends.append(latest.name)
        save(folder, small_state(9.0, 6))
        assert value_of(folder / "checkpoint-2") == 9.0
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert ends == sorted(ends) and len(set(ends)) == 2


def test_kill_9_never_loses_a_checkpoint_that_is_replaced(killed: Path, tmp_path: Path) -> None:
    """Saved again under its own name: at each point the old or the new one lies there whole."""
    for folder in folders_of(killed, tmp_path, 3):
        names = [path for path in folder.iterdir() if path.name.startswith("checkpoint-1")]
        whole = [path for path in names if path.suffix != ".tmp" and _is_whole(path)]
        assert whole, folder.name


def test_after_a_killed_replacement_the_next_save_succeeds(killed: Path, tmp_path: Path) -> None:
    for folder in folders_of(killed, tmp_path, 3):
        for _ in range(2):
            save(folder, small_state(5.0, 3))
            assert value_of(folder / "checkpoint-1") == 5.0
        assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


def test_latest_finds_what_a_killed_replacement_left(killed: Path, tmp_path: Path) -> None:
    """Killed between the two renames too, where the old one lies under another name."""
    for folder in folders_of(killed, tmp_path, 3):
        found = find_checkpoint(folder, "latest")
        assert found is not None and _is_whole(found), folder.name


def _is_whole(path: Path) -> bool:
    try:
        return value_of(path) in (1.0, 9.0)
    except UserError:
        return False


def test_a_failed_save_leaves_the_old_one_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk full at the third file."""
    save(tmp_path, small_state(1.0, 3))
    calls = 0

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.saving.checkpoint, "fsync_file", full)
    for updates in (3, 6):
        calls = 0
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, small_state(9.0, updates))
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
        assert value_of(tmp_path / "checkpoint-1") == 1.0
