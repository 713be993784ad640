"""The best checkpoint beside the last ones: OUTPUT/best-GAUGE, with its LoRA files.

Made of the checkpoint right after it is saved: its files are linked, not copied, so that they cost
no space and stay when the checkpoint is deleted. Which one is the best stands in the checkpoints
themselves; a folder that a kill has left behind them is made again when the run resumes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from shared.io.durable import building_folder, fsync_folder, link
from train.options import Expert
from train.saving.checkpoint import REPLACED_SUFFIX, list_checkpoints, put_in_place
from train.saving.export import write_loras_of

ASIDE_SUFFIX = ".aside"


def best_folder(output: Path, gauge: str) -> Path:
    """Where the best by this gauge lies."""
    return output / f"best-{gauge}"


def keep_as_best(
    output: Path,
    gauge: str,
    checkpoint: Path,
    expert: Expert,
    dtype: torch.dtype,
    complete: Callable[[Path], object],
) -> Path:
    """Replace the best so far by this checkpoint and its LoRA files in `dtype`; the folder.

    `complete` is called with the folder before it gets its name, to add what goes with the files.
    """
    final = best_folder(output, gauge)
    with building_folder(final) as building:
        inside = building / checkpoint.name
        inside.mkdir()
        for file in sorted(checkpoint.iterdir()):
            link(file, inside / file.name)
        write_loras_of(checkpoint, building, expert, dtype)
        complete(building)
        fsync_folder(inside)
        fsync_folder(building)
    put_in_place(building, final)
    return final


def settle_best(
    output: Path, gauge: str, name: str | None, remake: Callable[[Path], Path]
) -> tuple[bool, str | None]:
    """Make the folder agree with the state that a run starts from: whether it does, and a note.

    `name`: of the best checkpoint by that state, None: there is none yet. One of another run, or of
    an abandoned branch of this, is renamed. `remake` is called with a checkpoint of that name.
    """
    folder = best_folder(output, gauge)
    replaced = folder.with_name(folder.name + REPLACED_SUFFIX)
    if replaced.exists() and not folder.exists():  # killed between two renames
        replaced.rename(folder)
    inside = list_checkpoints(folder)
    if name is not None and [path.name for path in inside] == [name]:
        return True, None
    if name is not None and (output / name).is_dir():
        return True, f"made {remake(output / name)} again"
    note = None
    if folder.exists():
        aside = folder.with_name(folder.name + ASIDE_SUFFIX)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        note = f"set aside {folder.name}, which is not of this state: {aside.name}"
    if name is not None:
        note = f"{name}, the best so far, is gone; " + (note or "the next one counts")
    return name is None, note
