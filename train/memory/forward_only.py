"""One transformer on its device for passes without gradients, as memory options ask for it."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from shared.models.spec import ModelSpec, blocks_of
from train.memory.block_offload import stream_blocks, streaming_line
from train.memory.options import MemoryOptions
from train.memory.quantize import quantise
from train.model.attention import use_attention
from train.model.base import Base, load_base
from train.model.lora_adapter import LoraSpec
from train.model.roles import Roles
from train.options import Expert

T = TypeVar("T")

WITHOUT_LORA = partial(Roles, spec=LoraSpec(rank=1, alpha=1, targets=()), seed=0, names=())


def with_expert(
    spec: ModelSpec,
    expert: Expert,
    base: Base,
    memory: MemoryOptions,
    device: torch.device,
    say: Callable[[str], None],
    work: Callable[[Roles], T],
    *,
    attention: str,
    roles_of: Callable[[nn.Module], Roles] = WITHOUT_LORA,
) -> T:
    """What `work` gives with the expert on the device; its memory is free again afterwards.

    `work` is called, not a block entered, so that no name outlives it that would keep the weights.
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
            return work(roles)
    finally:
        del roles
        free_memory()


def free_memory() -> None:
    """Give back what modules held that nobody refers to any more."""
    gc.collect()  # modules, hooks and engines refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
