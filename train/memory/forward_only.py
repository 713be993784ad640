"""One transformer on its device for passes without gradients, as memory options ask for it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from shared.models.spec import ModelSpec, blocks_of
from train.memory.block_offload import stream_blocks, streaming_line
from train.memory.options import ForwardOnly, MemoryOptions
from train.memory.quantize import check_installed, quantise
from train.model.attention import check_attention, use_attention
from train.model.base import Base, load_base
from train.model.lora_adapter import LoraSpec
from train.model.roles import Roles
from train.options import Expert

_WITHOUT_LORA = partial(Roles, spec=LoraSpec(rank=1, alpha=1, targets=()), seed=0, names=())


def check_here(config: ForwardOnly, device: str) -> None:
    """UserError for what can't be computed here, before weights are read."""
    check_installed(config.base_precision)
    check_attention(config.attention_backend, device, config.mixed_precision)


@contextmanager
def loaded(
    spec: ModelSpec,
    expert: Expert,
    base: Base,
    memory: MemoryOptions,
    attention: str,
    device: torch.device,
    say: Callable[[str], None],
    roles_of: Callable[[nn.Module], Roles] = _WITHOUT_LORA,
) -> Iterator[Roles]:
    """The expert on the device; its memory is free again after the block.

    `roles_of` adds the adapters, if any, to the transformer, which lies on the CPU then.
    """
    transformer: Any = load_base(
        spec,
        expert,
        precision=memory.mixed_precision,
        device=device,
        gradient_checkpointing=False,
        base=base,
    )
    use_attention(transformer, attention)
    roles = roles_of(transformer)
    quantise(transformer, memory.base_precision, device)
    if streamed := memory.streamed(len(blocks_of(transformer))):
        say(streaming_line([stream_blocks(transformer, streamed, device)]))
    transformer.to(device)
    del transformer
    try:
        with torch.no_grad():
            yield roles
    finally:
        vars(roles).clear()  # the block's name for it is still there, and would keep the weights
        free_memory()


def free_memory() -> None:
    """Give back what modules held that nobody refers to any more."""
    gc.collect()  # modules, hooks and engines refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
