"""Regional compilation: torch.compile for the blocks, where nearly all of the time is spent."""

from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from shared.errors import UserError, first_line
from shared.models.spec import blocks_of, family_of

# All blocks share one code object, which dynamo compiles once for each role with and without
# gradient, and for the first block, whose input has none: seven times in `distill`, again where
# shapes become symbolic or validation has a batch of one. Its own limit of 8 would leave what comes
# later to eager code, with nothing but a line in the log.
RECOMPILE_LIMIT = 64


def check_compile(device: str) -> None:
    """UserError unless torch.compile works on `device`, found out by compiling a line."""

    def line(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        torch.compile(line)(torch.ones(8, device=device))
    except Exception as error:  # of a compiler, a driver, Triton …
        raise UserError(
            f"--compile: torch can't compile for {device} here ({first_line(error)}). It needs a "
            "C++ compiler (gcc, g++) and, for a GPU, Triton. Install them, or leave --compile out."
        ) from error


def compile_blocks(transformer: Any, *, several_shapes: bool) -> None:
    """Have a transformer compile its blocks at their first use; weights keep their names.

    `several_shapes`: with symbolic sizes at once, for data of more than one bucket; else sizes are
    fixed until a second one is seen.
    """
    torch._dynamo.config.cache_size_limit = max(
        torch._dynamo.config.cache_size_limit, RECOMPILE_LIMIT
    )
    # Fused kernels keep fp32 where eager code rounds to bf16 between operations, and teacher and
    # student would be other models than those which are sampled, in eager code.
    torch._inductor.config.emulate_precision_casts = True
    # Rotary embeddings are views of (frames, height, width, channels), and dynamo guards the sides
    # of a view's base: it would compile anew for clips with two equal sides.
    rotary = getattr(transformer, family_of(transformer).rotary)
    rotary.register_forward_hook(_in_memory_of_their_own)
    # Not diffusers' compile_repeated_blocks: hooks, by which blocks are fetched from CPU memory and
    # from other processes, would be compiled, too.
    for block in blocks_of(transformer):
        block.forward = torch.compile(block.forward, dynamic=True if several_shapes else None)


def _in_memory_of_their_own(
    rope: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(table.clone() for table in output)
