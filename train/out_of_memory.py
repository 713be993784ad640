"""A full GPU: how much was used, and what would fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.errors import UserError, first_line
from train.memory.plan import choices_of, first_that_fits
from train.run import Run, memory_settings
from train.saving.checkpoint import list_checkpoints

_GIB = 2**30


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no memory left; cuBLAS and NCCL have errors of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """A block whose lack of memory on the device becomes a UserError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--device: {run.device} is out of memory{_used(run.device)} "
            f"({first_line(error).removesuffix('.')}). {_cure(run)}"
        ) from error


def _used(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    peak, taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return (
        f": tensors took {peak / _GIB:.1f} GiB at the peak, torch {taken / _GIB:.1f} of "
        f"{_capacity(device) / _GIB:.1f} GiB"
    )


def _capacity(device: str) -> int:
    """Bytes of the card."""
    return torch.cuda.get_device_properties(device).total_memory


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
    room = _capacity(run.device) if run.device.startswith("cuda") else asked.estimate.total
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
