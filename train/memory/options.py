"""Options that decide how a run fits a device's memory, and how they go together."""

from dataclasses import dataclass
from typing import Annotated

import typer

from shared.cli.checks import REMEMBERED
from shared.errors import UserError
from train.options import (
    DEVICE,
    OPTIMIZER,
    PROCESSES,
    SHARDED,
    BasePrecision,
    OptimizerName,
    Precision,
    StrategyName,
)

_WHOLE_ONLY: dict[OptimizerName, str] = {
    "adamw8bit": "its codes are those of whole matrices, and the moments are in parts already",
    "adafactor": "it sums over whole rows and columns of a matrix",
    "prodigy": "it sums over all weights of a LoRA",
    "muon": "it orthogonalizes whole matrices",
}
"""Why an optimizer works only where each rank stores whole states."""

# fmt: off
MixedPrecision = Annotated[Precision, typer.Option(help="Base and compute in bf16 (LoRA stays fp32), or all in fp32.", rich_help_panel=DEVICE), REMEMBERED]
StoredPrecision = Annotated[BasePrecision | None, typer.Option(help="Storage format of the linear layers in the base's blocks: int8 and fp8 take half of bf16's memory, nf4 (bitsandbytes) less than a third. Teacher, generator and critic share them; matmuls stay in bf16 or fp32.", show_default="as --mixed-precision", rich_help_panel=DEVICE)]
LowVram = Annotated[bool, typer.Option("--low-vram", help="Keep the base's blocks in CPU memory and copy each to the GPU while the one before it computes. Slower for small clips.", show_default="off", rich_help_panel=DEVICE)]
BlocksToSwap = Annotated[int | None, typer.Option(metavar="N", help="Like --low-vram for N of the blocks, spread evenly; the others stay on the GPU.", show_default="none; with --low-vram all", rich_help_panel=DEVICE)]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Raises UserError for those that exclude one another."""

    # fmt: off
    strategy: Annotated[StrategyName | None, typer.Option(help="How processes share the work: ddp keeps the whole model in each; fsdp and zero3 shard it across them, zero2 only the optimizer (zero2, zero3: DeepSpeed).", show_default="the launcher's; else ddp for several processes, single for one", rich_help_panel=PROCESSES)] = None
    """None: not decided yet (`placement.place`)."""
    mixed_precision: MixedPrecision = "bf16"
    base_precision: StoredPrecision = None
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute each block in the backward pass: far less memory, a third more time.", show_default="on", rich_help_panel=DEVICE)] = True
    low_vram: LowVram = False
    """Does nothing where the strategy shards the base: VideoX-Fun's shell blocks ask for both."""
    blocks_to_swap: BlocksToSwap = None
    activation_offloading: Annotated[bool, typer.Option("--activation-offloading", help="Keep the activations that gradient checkpointing stores (each block's input) in CPU memory.", show_default="off", rich_help_panel=DEVICE)] = False
    keep_attention: Annotated[bool, typer.Option("--keep-attention", help="Do not recompute self-attention in checkpointed blocks: its outputs are kept, as much memory again as the blocks' inputs, and offloaded like these.", show_default="off", rich_help_panel=DEVICE)] = False
    use_8bit_adam: Annotated[bool, typer.Option("--use-8bit-adam", help="The same as --optimizer adamw8bit.", show_default="off", rich_help_panel=DEVICE)] = False
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer of the LoRA (distill: of both): adamw; adamw8bit, with 8-bit moments (matrices of fewer than 4096 weights keep fp32); torch's adafactor and muon, which keep less than AdamW; or prodigy (pip install 'wandistill[prodigy]'), which finds its rate. All but adamw: single and ddp. Rates: docs/training.md.", rich_help_panel=OPTIMIZER)] = "adamw"
    # fmt: on

    def __post_init__(self) -> None:
        self._check_base_precision()
        self._check_blocks_to_swap()
        option = "--low-vram" if self.low_vram else "--blocks-to-swap"
        waiting = (
            (option, self.streams),
            ("--activation-offloading", self.activation_offloading),
            ("--keep-attention", self.keep_attention),
        )
        for option, given in waiting:
            if given and not self.gradient_checkpointing:
                raise UserError(
                    f"{option}: found with --no-gradient-checkpointing, with which the backward pass "
                    "needs all of every block at once. Leave out one of the two."
                )
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise UserError(
                f"--use-8bit-adam: found with --optimizer {self.optimizer}; it means --optimizer "
                "adamw8bit. Leave out one of the two."
            )
        if self.shards_moments and (why := _WHOLE_ONLY.get(self.chosen_optimizer)):
            given = f"--optimizer: found {self.optimizer}"
            raise UserError(
                f"{'--use-8bit-adam: found' if self.use_8bit_adam else given} with --strategy "
                f"{self.strategy}, which shards optimizer states across ranks, but {why}. Use "
                "--strategy ddp, or --optimizer adamw."
            )

    def _check_base_precision(self) -> None:
        found = self.base_precision
        if found == "bf16" and self.mixed_precision == "no":
            raise UserError(
                "--base-precision: found bf16 with --mixed-precision no, which computes in fp32. "
                "Leave out one of the two; int8, fp8 and nf4 go with either."
            )
        if found not in (None, "bf16") and self.shards_base:
            raise UserError(
                f"--base-precision: found {found} with --strategy {self.strategy}, which shards "
                "weights across ranks as they are, not codes and their scales. Use "
                "--strategy ddp or zero2, or leave it out."
            )

    def _check_blocks_to_swap(self) -> None:
        found = self.blocks_to_swap
        if found is None:
            return
        from train.memory.block_offload import BUFFERS  # torch comes with it

        if found <= BUFFERS:
            raise UserError(
                f"--blocks-to-swap: found {found}, expected {BUFFERS + 1} or more: {BUFFERS} of "
                "them are on the device at any time."
            )
        if self.shards_base:
            raise UserError(
                f"--blocks-to-swap: found with --strategy {self.strategy}, which shards the base "
                "across ranks already. Use --strategy ddp or zero2, or leave it out; with "
                "zero3, offload_param in a DeepSpeed file keeps the base in CPU memory, too."
            )

    @property
    def chosen_optimizer(self) -> OptimizerName:
        """By its name, whichever option named it."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def shards_base(self) -> bool:
        """Whether each rank stores only a part of it."""
        return self.strategy in SHARDED

    @property
    def shards_moments(self) -> bool:
        """Whether each rank stores only a part of the optimizers' states."""
        return self.strategy not in (None, "single", "ddp")

    @property
    def streams(self) -> bool:
        """Whether blocks of the base live in CPU memory."""
        return (self.low_vram or self.blocks_to_swap is not None) and not self.shards_base

    def streamed(self, layers: int) -> list[int]:
        """Which of the transformer's blocks do. UserError if there are fewer."""
        from train.memory.block_offload import swapped_blocks

        if not self.streams:
            return []
        if (number := self.blocks_to_swap) is not None and number > layers:
            raise UserError(
                f"--blocks-to-swap: found {number}, expected at most {layers}, which this model "
                "has."
            )
        return swapped_blocks(layers, number)


class ForwardOnly:
    """Of a command that trains nothing: how one transformer fits the device."""

    mixed_precision: Precision
    base_precision: BasePrecision | None
    low_vram: bool
    blocks_to_swap: int | None
    attention_backend: str

    @property
    def memory(self) -> MemoryOptions:
        """UserError for what excludes one another."""
        return MemoryOptions(
            strategy="single",
            mixed_precision=self.mixed_precision,
            base_precision=self.base_precision,
            low_vram=self.low_vram,
            blocks_to_swap=self.blocks_to_swap,
        )
