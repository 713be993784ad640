"""FSDP2: every parameter is sharded across ranks, and whole only while its block works.

torch's `fully_shard` itself and not accelerate's plugin, which does nothing on a CPU.
"""

import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shared.models.spec import blocks_of
from train.distributed.process_group import Ranks
from train.model.roles import Roles
from train.optim.optimizers import OptimizerSettings
from train.strategies.base import Strategy
from train.strategies.ddp import optimizer_roles


def _take_from_first(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Move to the device what is not cut yet, with the values of the first process."""
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            continue
        held = parameter.detach()
        value = held.to(device) if ranks.first else torch.empty_like(held, device=device)
        dist.broadcast(value.view(torch.uint8), src=0)
        parameter.data = value


def sharded(
    roles: Roles, rates: Mapping[str, float], settings: OptimizerSettings,
    *, ranks: Ranks, device: torch.device,
) -> Strategy:  # fmt: skip
    """The strategy `fsdp`."""
    # Velocities are never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (ranks.mesh.data,), mesh_dim_names=("data",))
    transformer = roles.transformer
    for part in (*blocks_of(transformer), transformer):
        _take_from_first(part, ranks, device)
        fully_shard(part, mesh=mesh)  # leaves a part of it on the device
    return Strategy(
        trained=optimizer_roles(roles, rates, settings)
    )  # sharding has replaced the parameters
