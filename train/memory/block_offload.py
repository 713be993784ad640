"""Blocks of the frozen base that live in CPU memory and visit the device when they are needed.

All that is frozen in such a block lies in one stretch of page-locked CPU memory. On the device
there are two buffers of a block's size: while one block works, the next one is copied into the
other. The next one is the following block in a forward pass, and the one before in a backward pass,
in which checkpointed blocks are computed again from the last to the first. Frozen weights never
change, so nothing is copied back. LoRAs and all that lies outside of blocks stay on the device.

A block's parameters show its buffer from the beginning of its work until the buffer is given to
another block; otherwise they are empty, so that a use out of turn fails and does not compute with
another block's weights.

What makes it free of races, on top of `train.memory.copy_stream`: a buffer is written only
by copies. It is given to another block when the block after its own begins to work: all kernels
that read it have been queued by then, and the copy waits for those. That this holds for the
backward pass of a block, too, follows from the order of a backward pass, and is not relied on:
where autograd still holds a view of the buffer, it is left to autograd and replaced by a new one.

Not diffusers' group offloading: see docs/decisions.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from shared.models.spec import blocks_of
from train.memory.copy_stream import Copy, HostMemory, SideStream

BUFFERS = 2
"""On the device: one for the block that works, one for the next."""
_ALIGNMENT = 512  # bytes; more than any kernel asks for


def swapped_blocks(layers: int, count: int | None) -> list[int]:
    """Which of `layers` blocks live in CPU memory: `count` of them (None: all), spread evenly, so
    that each copy has the work of several blocks to hide behind."""
    count = layers if count is None else min(count, layers)
    return [number * layers // count for number in range(count)]


def blocks_on_device(layers: int, count: int | None) -> int:
    """How many blocks' frozen weights the device has room for then, buffers included."""
    swapped = len(swapped_blocks(layers, count))
    return layers - swapped + min(BUFFERS, swapped)


@dataclass(frozen=True)
class _Piece:
    """One frozen parameter of a block."""

    parameter: nn.Parameter
    start: int
    """Of its bytes in those of the block."""
    like: torch.Tensor
    """Shape, strides and dtype, on the meta device."""

    def of(self, stretch: torch.Tensor) -> torch.Tensor:
        """Its view of the block's bytes."""
        size = self.like.untyped_storage().nbytes()
        typed = stretch[self.start : self.start + size].view(self.like.dtype)
        return typed.as_strided(self.like.shape, self.like.stride())


@dataclass(frozen=True)
class _Block:
    home: HostMemory
    pieces: Sequence[_Piece]


class _Buffer:
    """Room for a block on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.copy = Copy()
        self._own_uses = self._uses()

    def __del__(self) -> None:
        self.copy.wait()

    def _uses(self) -> int:
        return torch._C._storage_Use_Count(self.bytes.untyped_storage()._cdata)

    @property
    def seen_by_others(self) -> bool:
        """Whether a tensor other than `bytes` lies in this memory."""
        return self._uses() > self._own_uses


def stream_blocks(
    transformer: nn.Module, numbers: Sequence[int], device: torch.device
) -> "StreamedBlocks":
    """Let these blocks of a transformer, which lies on the CPU, live in CPU memory from now on.

    All else is left to the caller. UserError where memory can't be locked.
    """
    blocks = blocks_of(transformer)
    streamed = StreamedBlocks([blocks[number] for number in numbers], device)
    transformer.streamed = streamed  # type: ignore[assignment]
    return streamed


def streamed_blocks(transformer: nn.Module) -> "StreamedBlocks | None":
    """Those of this transformer that live in CPU memory; None: it lies on one device."""
    return getattr(transformer, "streamed", None)


def streaming_line(stacks: "Sequence[StreamedBlocks]") -> str:
    """What people read of them."""
    return (
        f"stream   {sum(map(len, stacks))} blocks of "
        f"{sum(blocks.home_bytes for blocks in stacks) / 1e6:.3f} MB in CPU memory; on the device "
        f"{sum(blocks.buffer_bytes for blocks in stacks) / 1e6:.3f} MB for those that work"
    )


class StreamedBlocks:
    """Moves what is frozen in `blocks` to CPU memory, and has each block fetch it for its work.

    `blocks` in the order of a forward pass, on the CPU; what else is in them is left to the caller.
    Passes with gradients need gradient checkpointing. UserError where memory can't be locked.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._side = SideStream(device)
        self._device = device
        self._blocks: list[_Block] = []
        self._weights: set[int] = set()
        for block in blocks:
            self._blocks.append(self._moved(block))
            self._hide(self._blocks[-1])
            self._weights |= {id(piece.parameter) for piece in self._blocks[-1].pieces}
        size = max(block.home.bytes.nbytes for block in self._blocks)
        self._buffers = [_Buffer(size, device) for _ in range(min(BUFFERS, len(blocks)))]
        """The one that was not used for the longest time is first."""
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._begin, number))

    def _moved(self, block: nn.Module) -> _Block:
        pieces, size = [], 0
        for parameter in block.parameters():
            if not parameter.requires_grad:
                like = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
                )
                pieces.append(_Piece(parameter, size, like))
                size += -(-like.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        home = self._side.host_memory(size)
        for piece in pieces:
            piece.of(home.bytes).copy_(piece.parameter.data)
        return _Block(home, pieces)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def home_bytes(self) -> int:
        """Of the weights, which lie in CPU memory."""
        return sum(piece.like.nbytes for block in self._blocks for piece in block.pieces)

    @property
    def buffer_bytes(self) -> int:
        """Of the device."""
        return sum(buffer.bytes.nbytes for buffer in self._buffers)

    def __contains__(self, weight: nn.Parameter) -> bool:
        return id(weight) in self._weights

    def _begin(self, number: int, module: nn.Module, inputs: Any) -> None:
        """Block `number` is about to work, in a forward pass or computed again in a backward."""
        buffer = self._fetched(number, spared=None)
        buffer.copy.wait()
        block = self._blocks[number]
        for piece in block.pieces:
            piece.parameter.data = piece.of(buffer.bytes)
        following = self._following(number)
        if following is not None:
            self._fetched(following, spared=buffer)

    def _following(self, number: int) -> int | None:
        """The block that is needed after this one; None: another pass decides."""
        if torch._C._current_graph_task_id() != -1:  # inside of a backward pass
            return number - 1 if number > 0 else None
        if number + 1 < len(self._blocks):
            return number + 1
        return None if torch.is_grad_enabled() else 0  # with gradients the way back begins here

    def _fetched(self, number: int, *, spared: _Buffer | None) -> _Buffer:
        """The buffer that holds the block, or into which it is being copied from now on."""
        for buffer in self._buffers:
            if buffer.block == number:
                self._use(buffer)
                return buffer
        buffer = next(one for one in self._buffers if one is not spared)
        before, buffer.block = buffer.block, None
        if before is not None:
            self._hide(self._blocks[before])
        if buffer.seen_by_others:
            buffer.copy.wait()  # the memory is given back
            buffer.bytes = torch.empty_like(buffer.bytes)
        home = self._blocks[number].home.bytes
        buffer.copy = self._side.copy(buffer.bytes[: len(home)], home)
        buffer.block = number
        self._use(buffer)
        return buffer

    def _use(self, buffer: _Buffer) -> None:
        self._buffers = [one for one in self._buffers if one is not buffer] + [buffer]

    def _hide(self, block: _Block) -> None:
        for piece in block.pieces:
            piece.parameter.data = torch.empty(0, dtype=piece.like.dtype, device=self._device)
