"""DMD as an objective: a generator and a critic that take turns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shared.models.spec import TIMESTEPS
from train.data.batches import Batch
from train.functional.guidance import GuidanceTable
from train.methods.base import Method, few_steps
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
    head_start: int = 0
    """Critic updates before the first of these cycles."""
    uniform_sampling: bool
    learning_rates: Mapping[str, float]
    main_role: str = GENERATOR
    method: Method = "distill"

    @property
    def expert(self) -> Expert:
        return self.recipe.expert

    @property
    def first_noise(self) -> str | None:
        """None where a rollout begins with a state: what noise follows depends on the update."""
        return None if self.states else rollout_noise(self.recipe.walk[0])

    @property
    def states(self) -> range | None:
        first = self.recipe.walk[0]
        return range(first, first + 1) if self.recipe.start == "states" else None

    @property
    def cycle(self) -> int:
        return self.gen_update_interval + 1

    def role_of(self, update: int) -> str:
        """The critic goes first: a generator can't learn from a critic that knows nothing yet."""
        in_cycles = update - self.head_start
        last = in_cycles >= 0 and in_cycles % self.cycle == self.cycle - 1
        return GENERATOR if last else CRITIC

    def role_updates(self, role: str, update: int) -> int:
        generator = max(0, update - self.head_start) // self.cycle
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
        if self.recipe.match != "x0":
            return 0  # states are matched: no x̂0 to measure
        return gauge_passes(self.recipe)

    @property
    def samples_from_latents(self) -> bool:
        return self.recipe.start != "noise"

    def sample(self, roles: Roles, batch: Batch, negative: torch.Tensor) -> torch.Tensor:
        """The student's x̂0 at the last step that this expert walks to."""
        last = self.recipe.walk[-1]
        return rollout(
            roles, self.recipe, batch, last=last, with_gradient=False, purpose="validation"
        )

    def identity(self) -> dict[str, Any]:
        # Left out where there is none, as checkpoints of before have it.
        ahead = {"critic_warmup": self.head_start} if self.head_start else {}
        return {
            **self.recipe.identity(),
            **ahead,
            "gen_update_interval": self.gen_update_interval,
            "uniform_sampling": self.uniform_sampling,
        }

    def settings(self) -> dict[str, Any]:
        guidance = self.recipe.real_guidance_scale
        table = {"guidance_table": asdict(guidance)} if isinstance(guidance, GuidanceTable) else {}
        return {"batched_guidance": self.recipe.batched_guidance} | table

    def sampling(self) -> dict[str, Any]:
        return few_steps(self.recipe.schedule, self.recipe.pairing)

    def describe(self) -> list[str]:
        recipe, trained, end = self.recipe, self.recipe.exit_steps, self.recipe.matching.end
        intervals = dict.fromkeys(map(recipe.score_interval_of, trained))
        levels = ", ".join(f"[{low:.3f}, {high:.3f}]" for low, high in intervals)
        levels += " by exit" if recipe.score_levels == "exit" else ""
        last = f"; only {recipe.schedule.timesteps[trained[0]]:.1f} is trained"
        return [
            f"steps    {recipe.schedule.describe(recipe.expert)}; start {recipe.start}"
            f"{last if recipe.exits == 'last' else ''}; score levels u in {levels}"
            f"{'' if end is None else f'; states matched at {TIMESTEPS * end:.1f}'}",
            *self._describe_guidance(),
        ]

    def _describe_guidance(self) -> list[str]:
        table = self.recipe.real_guidance_scale
        if not isinstance(table, GuidanceTable):
            return []
        return [
            f"guidance of the teacher by noise level, {len(table.sigmas)} of them: "
            f"{table.scales[0]:.2f} at sigma {table.sigmas[0]:.3f} to {table.scales[-1]:.2f} at "
            f"{table.sigmas[-1]:.3f}, at most {max(table.scales):.2f} ({table.digest[:12]})"
        ]

    def describe_length(self, steps: int) -> str:
        ahead = f"{self.head_start} critic updates, then " if self.head_start else ""
        return (
            f"{ahead}{steps} generator updates, each after {self.gen_update_interval} critic "
            f"updates = {self.head_start + steps * self.cycle} updates"
        )
