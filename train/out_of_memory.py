"""A full GPU: what would fit."""

from contextlib import AbstractContextManager
from functools import partial

import torch

from shared.device import full_device_explained
from train.memory.plan import choices_of, first_that_fits
from train.run import Run, memory_settings
from train.saving.checkpoint import list_checkpoints

_GIB = 2**30


def explained(run: Run) -> AbstractContextManager[None]:
    """A block whose lack of memory on the device becomes a UserError that says what to change."""
    return full_device_explained(run.device, partial(_cure, run))


def _cure(run: Run) -> str:
    """The first options that fit by `wantrain plan`, and how to go on with them."""
    found = memory_settings(run)
    wider = "Use smaller or shorter clips (another cache), or a GPU with more memory."
    if found is None:
        return f"`wantrain plan` lists what options need. {wider}"
    asked, *others = choices_of(*found)
    less = [one for one in others if one.estimate.total < asked.estimate.total]
    if not less:
        return wider
    room = asked.estimate.total
    if run.device.startswith("cuda"):
        room = torch.cuda.get_device_properties(run.device).total_memory
    choice = first_that_fits(less, room) or min(less, key=lambda one: one.estimate.total)
    saved = list_checkpoints(run.config.output_dir)
    resume = ""
    if saved or not run.config.shards_moments:
        named = f" (saved: {saved[-1].name}, or a later one)" if saved else ""
        resume = f" --resume-from-checkpoint latest{named}"
    return (
        f"By `wantrain plan` these options need {choice.estimate.total / _GIB:.1f} GiB in place of "
        f"{asked.estimate.total / _GIB:.1f}: the same command with {choice.name}{resume}"
    )
