"""Options that decide how a run fits a device's memory, and how they go together."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shared.errors import UserError
from train.distributed.placement import SHARDED, StrategyName
from train.memory.block_offload import BUFFERS, swapped_blocks
from train.memory.quantize import BasePrecision, is_quantised
from train.model.base import Precision


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Named as the options. Raises UserError for those that exclude one another."""

    mixed_precision: Precision = "bf16"
    base_precision: BasePrecision | None = None
    """Of the linear layers in the base's blocks; None: as `mixed_precision` says."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits."""
    gradient_checkpointing: bool = True
    low_vram: bool = False
    """All blocks of the base live in CPU memory, or as many as `blocks_to_swap` says; not where the
    strategy cuts the base, which VideoX-Fun's shell blocks ask for together with this."""
    blocks_to_swap: int | None = None
    """So many do, also without `low_vram`."""
    activation_offloading: bool = False
    """What checkpointing keeps waits in CPU memory."""
    strategy: StrategyName = "single"

    @classmethod
    def of(cls, options: Mapping[str, Any], strategy: StrategyName) -> "MemoryOptions":
        """From all options of a command line."""
        return cls(**{one.name: options[one.name] for one in fields(cls)} | {"strategy": strategy})

    def __post_init__(self) -> None:
        self._check_base_precision()
        self._check_blocks_to_swap()
        option = "--low-vram" if self.low_vram else "--blocks-to-swap"
        waiting = ((option, self.streams), ("--activation-offloading", self.activation_offloading))
        for option, given in waiting:
            if given and not self.gradient_checkpointing:
                raise UserError(
                    f"{option}: found with --no-gradient-checkpointing, by which the backward pass "
                    "needs all of every block at once. Leave out one of the two."
                )
        if self.use_8bit_adam and self.cuts_moments:
            raise UserError(
                f"--use-8bit-adam: found with --strategy {self.strategy}, which cuts the moments "
                "among the processes already. Use --strategy ddp, or leave it out."
            )

    def _check_base_precision(self) -> None:
        found = self.base_precision
        if found == "bf16" and self.mixed_precision == "no":
            raise UserError(
                "--base-precision: found bf16 with --mixed-precision no, which computes in fp32. "
                "Leave out one of the two; int8, fp8 and nf4 go with either."
            )
        if is_quantised(found) and self.cuts_base:
            raise UserError(
                f"--base-precision: found {found} with --strategy {self.strategy}, which cuts "
                "weights among the processes as they are, not codes and their scales. Use "
                "--strategy ddp or zero2, or leave it out."
            )

    def _check_blocks_to_swap(self) -> None:
        found = self.blocks_to_swap
        if found is not None and found <= BUFFERS:
            raise UserError(
                f"--blocks-to-swap: found {found}, expected {BUFFERS + 1} or more: {BUFFERS} of "
                "them are on the device at any time."
            )
        if found is not None and self.cuts_base:
            raise UserError(
                f"--blocks-to-swap: found with --strategy {self.strategy}, which cuts the base "
                "among the processes already. Use --strategy ddp or zero2, or leave it out; with "
                "zero3, offload_param in a DeepSpeed file keeps the base in CPU memory, too."
            )

    @property
    def cuts_base(self) -> bool:
        """Whether a process holds a part of it only."""
        return self.strategy in SHARDED

    @property
    def cuts_moments(self) -> bool:
        """Whether a process holds a part of the optimizers' states only."""
        return self.strategy not in ("single", "ddp")

    @property
    def streams(self) -> bool:
        """Whether blocks of the base live in CPU memory."""
        return (self.low_vram or self.blocks_to_swap is not None) and not self.cuts_base

    def streamed(self, layers: int) -> list[int]:
        """Which of the transformer's blocks do. UserError if there are fewer."""
        if not self.streams:
            return []
        if (number := self.blocks_to_swap) is not None and number > layers:
            raise UserError(
                f"--blocks-to-swap: found {number}, expected at most {layers}, which this model "
                "has."
            )
        return swapped_blocks(layers, number)
