"""FSDP2: every parameter is cut among the processes, and whole only while its block works.

torch's `fully_shard` itself and not accelerate's plugin, which does nothing on a CPU.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shared.models.spec import blocks_of
from train.distributed.process_group import Ranks
from train.model.roles import Roles
from train.strategies.base import AdamSettings, Strategy
from train.strategies.ddp import adamw, moments_of, stepped


@dataclass(frozen=True)
class ShardedRole:
    """A role of whose LoRA and moments every process holds a part."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.AdamW

    def update(self, rate: float, max_norm: float) -> float:
        # Gradients have been averaged over the processes in the backward pass.
        return stepped(self.parameters, self.optimizer, rate, max_norm)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: _whole(parameter.detach()) for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        held = moments_of(self.parameters, self.optimizer)
        return {name_and_moment: _whole(value) for name_and_moment, value in held.items()}

    def load(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
    ) -> None:
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(_cut(weights[name], parameter))
        for name_and_moment, value in moments.items():
            name, moment = name_and_moment.rsplit("/", 1)
            parameter = self.parameters[name]
            held = value.clone() if moment == "step" else _cut(value, parameter)
            self.optimizer.state[parameter][moment] = held


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _cut(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole `value` spread as `like` is."""
    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


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
    roles: Roles, rates: Mapping[str, float], adam: AdamSettings,
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
    cut = {}
    for role in rates:  # sharding has replaced the parameters
        parameters = roles.parameters(role)
        cut[role] = ShardedRole(parameters, adamw(parameters, adam))
    return Strategy(trained=cut)
