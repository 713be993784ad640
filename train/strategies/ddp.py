"""Every process holds all: one process, or several that average the LoRA's gradients (DDP).

Not torch's DistributedDataParallel: it expects every trainable weight to get a gradient in every
backward pass, and here each update leaves the other role's LoRA without; nor would its overlap of
communication with the backward pass gain anything for gradients that are a hundredth of the base.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.distributed.process_group import SINGLE, Ranks
from train.model.roles import Roles
from train.optim import optimizers
from train.optim.optimizers import OptimizerSettings

OF_ALL = "optimizer"
"""Stands for a weight's name where a checkpoint holds a number of all weights together."""


@dataclass(frozen=True)
class OptimizerRole:
    """A role with an optimizer of torch's kind: whole in every process, or in parts (FSDP2)."""

    parameters: Mapping[str, nn.Parameter]
    """Under global names; DTensors where each process holds a part."""
    optimizer: torch.optim.Optimizer
    ranks: Ranks = SINGLE
    """Processes whose gradients are yet to be averaged; FSDP2 does it in the backward pass."""

    def update(self, rate: float, max_norm: float) -> float:
        self._average_gradients()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm))
        found = norm.item()  # the one wait for the device in an update, beside the loss's
        if math.isfinite(found):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _average_gradients(self) -> None:
        if self.ranks.world_size == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.ranks.mesh.data
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        states = {
            f"{name}/{moment}": whole(value)
            for name, parameter in self.parameters.items()
            for moment, value in optimizers.state_of(self.optimizer, parameter).items()
        }
        numbers = optimizers.numbers_of(self.optimizer)
        return states | {f"{OF_ALL}/{name}": value for name, value in numbers.items()}

    def load(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
    ) -> None:
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(_placed_as(parameter, weights[name]))
        for name_and_moment, value in moments.items():
            name, moment = name_and_moment.rsplit("/", 1)
            if name == OF_ALL:
                self.optimizer.param_groups[0][moment] = value.item()
                continue
            parameter = self.parameters[name]
            # torch keeps Adam's step counter on the CPU, the moments beside the parameter.
            held = value.to("cpu") if moment == "step" else _placed_as(parameter, value)
            optimizers.put_state(self.optimizer, parameter, moment, held)


def whole(value: torch.Tensor) -> torch.Tensor:
    """All parts of it; all processes call it together where it is in parts."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _placed_as(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The whole `value` on the device of `like`, and in parts as that is."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def optimizer_roles(
    roles: Roles, rates: Mapping[str, float], settings: OptimizerSettings, ranks: Ranks = SINGLE
) -> dict[str, OptimizerRole]:
    """Each role with an optimizer on its parameters as they are now."""
    made = {}
    for role in rates:
        parameters = roles.parameters(role)
        optimizer = optimizers.make_optimizer(settings, parameters.values())
        made[role] = OptimizerRole(parameters, optimizer, ranks)
    return made
