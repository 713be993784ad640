"""The device that a stage computes on. torch is imported when a command runs, not for --help."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shared.errors import UserError, first_line

if TYPE_CHECKING:
    import torch


def take_device(device: str) -> None:
    """Have this thread compute on `device` from now on. UserError unless torch can.

    CUDA calls that name no device go there, then. By themselves they go to card 0, where each of
    several processes would take a context's memory.
    """
    import torch

    try:
        torch.empty(0, device=device)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        # A name that is no device makes torch list all that it was ever built for.
        why = str(error).strip().partition("\n")[0].removesuffix(".")
        why = "no such kind of device" if why.startswith("Expected one of") else why
        raise UserError(
            f"--device: found {device!r}, which torch can't use ({why}). "
            "Expected auto, cpu, cuda, cuda:1 …"
        ) from error


def default_device() -> str:
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_device(option: str) -> str:
    """What --device means: auto is a GPU where there is one."""
    return default_device() if option == "auto" else option


@contextmanager
def full_device_explained(device: str, cure: Callable[[], str]) -> Iterator[None]:
    """A block whose lack of memory on the device becomes a UserError that ends in the `cure`.

    cuBLAS and NCCL have errors of their own for it.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        raise UserError(
            f"--device: {device} is out of memory{_used(device)} "
            f"({first_line(error).removesuffix('.')}). {cure()}"
        ) from error


def _used(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return ""
    peak, taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    return (
        f": tensors took {peak / 2**30:.1f} GiB at the peak, torch {taken / 2**30:.1f} of "
        f"{whole / 2**30:.1f} GiB"
    )


def to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """A CPU tensor on `device`. From page-locked memory: any other copy to a GPU waits until all
    that was queued there is done, and the GPU then for the CPU."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
