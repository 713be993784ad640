"""Plain flow matching as an objective: one LoRA that learns the cached clips."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shared.device import to_device
from train.data.batches import Batch
from train.functional.schedule import shift_sigma
from train.methods.base import Method, OneRole
from train.methods.flow_matching import (
    FIRST_NOISE,
    NoiseLevels,
    flow_matching_step,
    guided_velocity,
    loss_at,
    walk,
)
from train.methods.step_output import StepOutput
from train.model.roles import Roles
from train.options import Expert

LORA = "lora"  # the one role
VALIDATION_STEPS, VALIDATION_GUIDANCE = 20, 5.0


@dataclass(frozen=True, kw_only=True)
class Finetuning(OneRole):
    """Objective of `wantrain lora`."""

    levels: NoiseLevels
    uniform_sampling: bool
    strata: int
    """Samples in a row whose levels are spread evenly: those of an update, or 1."""
    learning_rates: Mapping[str, float]
    seed: int
    main_role: str = LORA
    method: Method = "lora"
    first_noise: str = FIRST_NOISE
    states: None = None

    @property
    def expert(self) -> Expert:
        return self.levels.expert

    def loss(self, roles: Roles, role: str, batch: Batch, negative: torch.Tensor) -> StepOutput:
        return flow_matching_step(
            roles, role, self.levels, batch, strata=self.strata, seed=self.seed
        )

    @torch.no_grad()
    def held_out_loss(self, roles: Roles, batch: Batch, quantile: float) -> torch.Tensor:
        """The loss, scalar, at this quantile in [0, 1] of the noise levels.

        The noise is a stream of its own, the same with every seed.
        """
        sigma = self.levels.sigma(torch.full((len(batch.samples),), quantile))
        sigma = to_device(sigma, batch.latents.device)
        return loss_at(roles, LORA, batch, sigma, batch.noise(0, "held out"))

    @property
    def samples_from_latents(self) -> bool:
        return self.expert == "low"  # it never sees pure noise

    @torch.no_grad()
    def sample(self, roles: Roles, batch: Batch, negative: torch.Tensor) -> torch.Tensor:
        """By Euler steps with guidance.

        Of those over all levels, even before the shift, the expert's are taken; the clip is x̂0 of
        the last.
        """
        low, high = self.levels.interval
        even = [1 - step / VALIDATION_STEPS for step in range(VALIDATION_STEPS)]

        def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
            return guided_velocity(roles, x_t, timestep, batch, negative, VALIDATION_GUIDANCE)

        with roles.role(LORA):
            return walk(
                batch,
                [shift_sigma(u, self.levels.shift) for u in even if low <= u <= high],
                predict,
                lambda _: batch.noise(self.seed, "validation"),
                from_latents=self.samples_from_latents,
                renoise=False,
            )

    def identity(self) -> dict[str, Any]:
        levels = self.levels
        normal = levels.sampling == "logit-normal"
        return {
            "boundary_type": levels.expert,
            "flow_shift": levels.shift,
            "timestep_sampling": levels.sampling,
            "logit_mean": levels.mean if normal else None,
            "logit_std": levels.std if normal else None,
            "uniform_sampling": self.uniform_sampling,
        }

    def sampling(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "denoising_step_indices_list": (),
            "flow_shift": self.levels.shift,
            "boundary": self.levels.boundary,
            "pairing": None,
        }

    def describe(self) -> list[str]:
        levels = self.levels
        low, high = levels.timesteps
        drawn = "uniform"
        if levels.sampling == "logit-normal":
            drawn = f"logit-normal (mean {levels.mean:g}, deviation {levels.std:g})"
        return [
            f"levels   timesteps {low:.1f} to {high:.1f}, {drawn} before the shift of "
            f"{levels.shift:g}"
        ]
