"""Copies between a GPU and page-locked CPU memory while the GPU computes.

On a CPU a copy is done when it has begun; everything else is the same code.

What keeps the copies and the computing out of each other's way, whoever uses this module:

1. A copy begins after all that was queued on the compute stream before it. So its source has been
   written, and whatever read or wrote its target's memory has finished. That holds for memory that
   the allocator hands on, too: all GPU memory is made on the compute stream, and handed on in its
   order.
2. The compute stream waits for a copy (`Copy.wait`) before it reads the target, and before GPU
   memory that the copy reads or writes is given back or written by anything but another copy.
3. Copies follow one another in the order in which they were begun, and nothing else touches the CPU
   memory. So that can be the target of one, then the source of the next, then a target again.

No GPU has run the branches for CUDA yet.
"""

from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any
from weakref import finalize

import torch

from shared.errors import UserError, first_line


@dataclass(frozen=True)
class Copy:
    """A copy that has begun."""

    compute: Any = None
    done: Any = None
    """CUDA's stream and event; None on a CPU."""

    def wait(self) -> None:
        """All that is queued on the compute stream from now on comes after the copy."""
        if self.done is not None:
            self.compute.wait_event(self.done)


class SideStream:
    """Copies beside the computing of one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._compute = torch.cuda.current_stream(device)  # no other one computes here
            self._copies = torch.cuda.Stream(device)

    @torch.no_grad()
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """Begin target ← source."""
        if not self._cuda:
            target.copy_(source)
            return Copy()
        self._copies.wait_stream(self._compute)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            return Copy(self._compute, self._copies.record_event())

    def host_memory(self, size: int) -> "HostMemory":
        """CPU memory that the GPU reaches by itself. UserError where the system refuses."""
        pages = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        memory = HostMemory(torch.frombuffer(pages, dtype=torch.uint8))
        if self._cuda:
            from torch.cuda._pin_memory_utils import pin_memory

            try:
                pin_memory(memory.bytes.data_ptr(), size)
            except RuntimeError as error:
                raise UserError(
                    f"--low-vram, --blocks-to-swap, --activation-offloading: can't lock "
                    f"{size / 2**30:.2f} GiB more of CPU memory for the GPU "
                    f"({first_line(error)}). Free some memory, or leave the option out."
                ) from error
            finalize(memory, self._unlock, memory.bytes).atexit = False  # pages go with a process
        return memory

    def _unlock(self, memory: torch.Tensor) -> None:
        from torch.cuda._pin_memory_utils import unpin_memory

        self._copies.synchronize()
        unpin_memory(memory.data_ptr())


@dataclass(frozen=True, eq=False)
class HostMemory:
    """Pages of their own, locked where they lie for as long as this object is there.

    Tensor.pin_memory would take the next power of two of bytes: 1 GiB for a block of 0.7.
    """

    bytes: torch.Tensor
    """(size,) uint8."""
