"""Every process holds all: one process, or several that average the LoRA's gradients (DDP).

Not torch's DistributedDataParallel: it expects every trainable weight to get a gradient in every
backward pass, and here each update leaves the other role's LoRA without; nor would its overlap of
communication with the backward pass gain anything for gradients that are a hundredth of the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from train.distributed.process_group import Ranks
from train.model.roles import Roles
from train.optim.adamw8bit import AdamW8bit
from train.strategies.base import AdamSettings, Strategy


@dataclass(frozen=True)
class WholeRole:
    """A role whose LoRA and optimizer are whole in every process."""

    parameters: Mapping[str, nn.Parameter]
    """Under global names."""
    optimizer: torch.optim.AdamW
    ranks: Ranks

    def update(self, rate: float, max_norm: float) -> float:
        self._average_gradients()
        return stepped(self.parameters, self.optimizer, rate, max_norm)

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

    def weights(self) -> Mapping[str, torch.Tensor]:
        return self.parameters

    def moments(self) -> dict[str, torch.Tensor]:
        return moments_of(self.parameters, self.optimizer)

    def load(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
    ) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
        for name_and_moment, value in moments.items():
            name, moment = name_and_moment.rsplit("/", 1)
            parameter = self.parameters[name]
            # torch keeps Adam's step counter on the CPU, the moments beside the parameter.
            place = "cpu" if moment == "step" else parameter.device
            held = value.to(place).clone()
            if isinstance(self.optimizer, AdamW8bit):
                self.optimizer.put(parameter, moment, held)
            else:
                self.optimizer.state[parameter][moment] = held


def stepped(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    rate: float,
    max_norm: float,
) -> float:
    """Clip, step unless the norm is not finite, forget the gradients; the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    if hasattr(norm, "full_tensor"):  # of gradients that are spread
        norm = norm.full_tensor()
    if bool(norm.isfinite()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def moments_of(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """ "name/moment" → what the optimizer holds in this process, in fp32."""

    def held(parameter: nn.Parameter) -> Mapping[str, torch.Tensor]:
        if isinstance(optimizer, AdamW8bit):
            return optimizer.moments(parameter)
        return optimizer.state.get(parameter, {})

    return {
        f"{name}/{moment}": value
        for name, parameter in parameters.items()
        for moment, value in held(parameter).items()
    }


def adamw(parameters: Mapping[str, nn.Parameter], adam: AdamSettings) -> torch.optim.AdamW:
    optimizer = AdamW8bit if adam.eight_bit else torch.optim.AdamW
    return optimizer(
        parameters.values(), betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay
    )


def replicated(
    roles: Roles, rates: Mapping[str, float], adam: AdamSettings, *, ranks: Ranks
) -> Strategy:
    """The strategies `single` and `ddp`."""
    whole = {}
    for role in rates:
        parameters = roles.parameters(role)
        whole[role] = WholeRole(parameters, adamw(parameters, adam), ranks)
    return Strategy(trained=whole)
