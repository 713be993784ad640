"""The strategy of a name, put to work; and the bytes that this rank stores then."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from train.distributed.process_group import Ranks
from train.memory.block_offload import stream_blocks, streamed_blocks
from train.model.roles import Roles
from train.optim.optimizers import OptimizerSettings
from train.options import SHARDED, StrategyName
from train.strategies.base import Strategy


def spread(
    name: StrategyName, roles: Roles, rates: Mapping[str, float], settings: OptimizerSettings,
    *, ranks: Ranks, device: torch.device, streamed: Sequence[int], accumulation: int,
    max_norm: float,
) -> Strategy:  # fmt: skip
    """Spread the transformer and the LoRAs in it over the processes, each on its `device`.

    This changes the transformer in place. Strategies that shard it take it from the CPU, block by
    block, since it need not fit on a device whole, and its values from the first process, which
    may be the only one to have them; with the others, the blocks of these numbers are streamed.
    """
    assert not (streamed and name in SHARDED)
    if streamed:
        stream_blocks(roles.transformer, streamed, device)
    if name not in SHARDED:
        roles.transformer.to(device)
    if name in ("single", "ddp"):
        from train.strategies.ddp import optimizer_roles

        return Strategy(trained=optimizer_roles(roles, rates, settings, ranks))
    if name == "fsdp":
        from train.strategies.fsdp import sharded

        return sharded(roles, rates, settings, ranks=ranks, device=device)
    from train.strategies.zero import partitioned

    stage: Literal[2, 3] = 2 if name == "zero2" else 3
    return partitioned(
        roles, rates, settings,
        stage=stage, ranks=ranks, device=device, accumulation=accumulation, max_norm=max_norm,
    )  # fmt: skip


def parameter_bytes(transformer: nn.Module) -> int:
    """Of all parameters, whole."""
    return sum(p.numel() * p.element_size() for p in transformer.parameters())


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What this rank stores of them between passes, whichever strategy sharded them."""

    def held(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        return cast(torch.Tensor, getattr(tensor, "ds_tensor", tensor))  # ZeRO-3's part of it

    return sum(part.nbytes for part in map(held, tensors))


def device_bytes(transformer: nn.Module) -> int:
    """What this rank stores of the parameters on the device, and of the buffers that streamed
    ones visit there."""
    streamed = streamed_blocks(transformer)
    if streamed is None:
        return held_bytes(transformer.parameters())
    staying = (p for p in transformer.parameters() if p not in streamed)
    return held_bytes(staying) + streamed.buffer_bytes
