"""What gradient checkpointing keeps for the backward pass, kept in CPU memory.

Of each block that is its first input, the hidden states: (B, tokens, width), as much again for
every block. While the block works they are copied out. In the backward pass, when a block begins to
be computed again, those of the block that comes next, the one before it, are copied back. The other
inputs (text, time) are the same tensors for all blocks and stay where they are. With
`train.memory.keep_attention` the outputs of self-attention go the same ways, each beside the hidden
states of its block.

What makes it free of races, on top of `train.memory.copy_stream`: hidden states on their way out
are held until the compute stream has been told to wait for that copy, those on their way back
likewise, even if nobody asks for them in the end. CPU memory goes from one to the next only
through copies.

Not torch's `save_on_cpu`, which waits for each copy, takes pinned memory in powers of two, and
moves what blocks share once for each: see docs/decisions.md.
"""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

from train.memory.copy_stream import Copy, HostMemory, SideStream
from train.memory.keep_attention import keeping


@dataclass(frozen=True)
class _Moving:
    """A tensor on the device and the copy from or to it; not to be let go before that is done."""

    tensor: torch.Tensor
    copy: Copy

    def settle(self) -> torch.Tensor:
        """The tensor, free to be used or let go."""
        self.copy.wait()
        return self.tensor


class _Kept:
    """What is held in place of hidden states, or of an output of self-attention."""

    def __init__(
        self,
        home: HostMemory,
        like: torch.Tensor,
        before: "weakref.ref[_Kept] | None",
        free: list[HostMemory],
    ) -> None:
        self.home = home
        self.like = like
        """Shape, strides and dtype, on the meta device; as they were, so that a copy is one stretch
        of bytes, and the block is computed again from the same layout."""
        self.before = before
        """Hidden states that were put away before this, and are needed after it."""
        self.of_block: list[_Kept] = []
        """Of hidden states: what their block put away, and needs with them."""
        self.coming: _Moving | None = None
        self._free = free

    @property
    def values(self) -> torch.Tensor:
        """In CPU memory."""
        typed = self.home.bytes[: self.like.nbytes].view(self.like.dtype)
        return typed.as_strided(self.like.shape, self.like.stride())

    def __del__(self) -> None:
        if self.coming is not None:
            self.coming.settle()
        self._free.append(self.home)


class ActivationOffloading:
    """Gradient checkpointing for one transformer, by which hidden states wait in CPU memory."""

    def __init__(self, device: torch.device, *, keep_attention: bool = False) -> None:
        self._contexts = (
            partial(keeping, self._put_beside, self._fetched) if keep_attention else noop_context_fn
        )
        self._side = SideStream(device)
        self._device = device
        self._free: list[HostMemory] = []
        self._leaving: _Moving | None = None
        self._last: weakref.ref[_Kept] | None = None

    def checkpoint(self, block: nn.Module, hidden_states: torch.Tensor, *others: Any) -> Any:
        """The block's output. To be given to diffusers' `enable_gradient_checkpointing`."""
        # checkpoint() saves its arguments under these hooks, and what the block saves under its own
        place = (hidden_states.data_ptr(), hidden_states.shape)  # the hook must not hold the values
        with saved_tensors_hooks(partial(self._put_away, place), self._fetched):
            return checkpoint(
                block.__call__,
                hidden_states,
                *others,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing inside of a block is random
                context_fn=self._contexts,
            )

    def _put_away(self, place: tuple[int, torch.Size], saved: torch.Tensor) -> Any:
        if (saved.data_ptr(), saved.shape) != place:
            return saved
        kept = self._put(saved, self._last)
        self._last = weakref.ref(kept)
        return kept

    def _put_beside(self, output: torch.Tensor) -> _Kept:
        """What the block whose hidden states were put away last needs again."""
        kept = self._put(output, None)
        hidden_states = None if self._last is None else self._last()
        if hidden_states is not None:
            hidden_states.of_block.append(kept)
        return kept

    def _put(self, tensor: torch.Tensor, before: "weakref.ref[_Kept] | None") -> _Kept:
        self._settle()
        like = torch.empty_like(tensor, device="meta")
        kept = _Kept(self._memory(tensor.nbytes), like, before, self._free)
        self._leaving = _Moving(tensor, self._side.copy(kept.values, tensor))
        return kept

    def _fetched(self, saved: Any) -> Any:
        if not isinstance(saved, _Kept):
            return saved
        self._settle()
        tensor = self._coming(saved).settle()
        saved.coming = None
        following = None if saved.before is None else saved.before()
        soon = [*saved.of_block]
        if following is not None:
            soon += [following, *following.of_block]
        for kept in soon:
            kept.coming = self._coming(kept)
        return tensor

    def _coming(self, kept: _Kept) -> _Moving:
        if kept.coming is not None:
            return kept.coming
        tensor = torch.empty_like(kept.like, device=self._device)
        return _Moving(tensor, self._side.copy(tensor, kept.values))

    def _settle(self) -> None:
        if self._leaving is not None:
            self._leaving.settle()
            self._leaving = None

    def _memory(self, size: int) -> HostMemory:
        """The largest that is free, or new memory where that is too small."""
        if self._free:
            largest = max(self._free, key=lambda memory: memory.bytes.nbytes)
            self._free.remove(largest)
            if largest.bytes.nbytes >= size:
                return largest
        return self._side.host_memory(size)
