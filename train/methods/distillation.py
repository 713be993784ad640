"""DMD as an objective: a generator and a critic that take turns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from train.data.batches import Batch
from train.methods.base import Method
from train.methods.dmd import Recipe, critic_step, generator_step, rollout, rollout_noise
from train.methods.step_output import StepOutput
from train.methods.teacher_gauges import gauge_passes, teacher_gauges
from train.model.roles import CRITIC, GENERATOR, Roles
from train.options import Expert


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Objective of `wantrain distill`."""

    recipe: Recipe
    gen_update_interval: int
    """Critic updates before each generator update."""
    uniform_sampling: bool
    learning_rates: Mapping[str, float]
    main_role: str = GENERATOR
    method: Method = "distill"

    @property
    def expert(self) -> Expert:
        return self.recipe.expert

    @property
    def first_noise(self) -> str:
        return rollout_noise(self.recipe.walk[0])

    @property
    def cycle(self) -> int:
        return self.gen_update_interval + 1

    def role_of(self, update: int) -> str:
        """The critic goes first: a generator can't learn from a critic that knows nothing yet."""
        return GENERATOR if update % self.cycle == self.cycle - 1 else CRITIC

    def role_updates(self, role: str, update: int) -> int:
        generator = update // self.cycle
        return generator if role == GENERATOR else update - generator

    def loss(self, roles: Roles, role: str, batch: Batch, negative: torch.Tensor) -> StepOutput:
        if role == GENERATOR:
            return generator_step(roles, self.recipe, batch, negative)
        return critic_step(roles, self.recipe, batch)

    def teacher_gauges(
        self, roles: Roles, batch: Batch, negative: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        return teacher_gauges(roles, self.recipe, batch, negative)

    @property
    def gauge_passes(self) -> int:
        return gauge_passes(self.recipe)

    @property
    def samples_from_latents(self) -> bool:
        return self.recipe.start == "latents"

    def sample(self, roles: Roles, batch: Batch, negative: torch.Tensor) -> torch.Tensor:
        """The student's x̂0 at the last step that this expert walks to."""
        last = self.recipe.walk[-1]
        return rollout(
            roles, self.recipe, batch, last=last, with_gradient=False, purpose="validation"
        )

    def identity(self) -> dict[str, Any]:
        return self.recipe.identity() | {
            "gen_update_interval": self.gen_update_interval,
            "uniform_sampling": self.uniform_sampling,
        }

    def settings(self) -> dict[str, Any]:
        return {"batched_guidance": self.recipe.batched_guidance}

    def sampling(self) -> dict[str, Any]:
        schedule = self.recipe.schedule
        return {
            "method": self.method,
            "denoising_step_indices_list": schedule.indices,
            "flow_shift": schedule.shift,
            "boundary": schedule.boundary,
            "pairing": self.recipe.pairing,
        }

    def describe(self) -> list[str]:
        schedule = self.recipe.schedule
        steps = ", ".join(f"{t:.1f}" for t in schedule.timesteps)
        owned = schedule.owned_steps(self.recipe.expert)
        own = ", ".join(f"{schedule.timesteps[step]:.1f}" for step in owned)
        low, high = self.recipe.score_interval
        return [
            f"steps    {steps} (shift {schedule.shift:g}); this expert owns {own}; start "
            f"{self.recipe.start}; score levels u in [{low:.3f}, {high:.3f}]"
        ]

    def describe_length(self, steps: int) -> str:
        return (
            f"{steps} generator updates, each after {self.gen_update_interval} critic "
            f"updates = {steps * self.cycle} updates"
        )
