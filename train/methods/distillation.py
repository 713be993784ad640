"""DMD as an objective: a generator and a critic that take turns; and how such a run is prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shared.errors import UserError
from shared.models.spec import ModelSpec
from train.config import DistillConfig
from train.data.batches import Batch
from train.data.dataset import Dataset
from train.functional.schedule import Expert, Schedule
from train.methods.base import Method
from train.methods.dmd import Recipe, critic_step, generator_step, rollout
from train.methods.step_output import Watched
from train.model.roles import CRITIC, GENERATOR, Roles
from train.run import Run, captions_alone, open_data, plan_run


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Objective of `wantrain distill`."""

    recipe: Recipe
    gen_update_interval: int
    """Critic updates before each generator update."""
    uniform_sampling: bool
    learning_rates: Mapping[str, float]
    product: str = GENERATOR
    method: Method = "distill"

    @property
    def expert(self) -> Expert:
        return self.recipe.expert

    @property
    def cycle(self) -> int:
        return self.gen_update_interval + 1

    def role_of(self, update: int) -> str:
        """The critic goes first: a generator can't learn from a critic that knows nothing yet."""
        return GENERATOR if update % self.cycle == self.cycle - 1 else CRITIC

    def role_updates(self, role: str, update: int) -> int:
        generator = update // self.cycle
        return generator if role == GENERATOR else update - generator

    def loss(self, roles: Roles, role: str, batch: Batch, negative: torch.Tensor) -> Watched:
        if role == GENERATOR:
            return generator_step(roles, self.recipe, batch, negative)
        return critic_step(roles, self.recipe, batch)

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
        recipe = self.recipe
        return {
            "boundary_type": recipe.expert,
            "denoising_step_indices_list": list(recipe.schedule.indices),
            "flow_shift": recipe.schedule.shift,
            "start": recipe.start,
            "pairing": recipe.pairing,
            "score_floor": recipe.score_floor,
            "maths": recipe.maths,
            "real_guidance_scale": recipe.real_guidance_scale,
            "fake_guidance_scale": recipe.fake_guidance_scale,
            "gen_update_interval": self.gen_update_interval,
            "fm_loss_weight": recipe.fm_loss_weight,
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

    def describe_length(self, product_updates: int) -> str:
        return (
            f"{product_updates} generator updates, each after {self.gen_update_interval} critic "
            f"updates = {product_updates * self.cycle} updates"
        )


def prepare_distillation(config: DistillConfig) -> Run:
    """Read configs and index, check that shards and model belong together, and plan.

    Raises UserError for everything that a user can get wrong; no weight has been read by then.
    """
    spec, data = open_data(config)
    expert: Expert = config.boundary_type or ("low" if spec.two_experts else "full")
    schedule = Schedule(
        indices=config.denoising_step_indices_list,
        shift=spec.flow_shift if config.flow_shift is None else config.flow_shift,
        boundary=spec.boundary,
    )
    recipe = Recipe(
        expert=expert,
        schedule=schedule,
        start=config.start
        or ("latents" if expert == "low" and config.recipe == "corrected" else "noise"),
        pairing=config.pairing,
        score_floor=config.score_floor,
        maths=config.recipe,
        real_guidance_scale=config.real_guidance_scale,
        fake_guidance_scale=config.fake_guidance_scale,
        fm_loss_weight=config.fm_loss_weight,
        score_strata=config.update_batch if config.uniform_sampling else 1,
        batched_guidance=config.batched_guidance,
        seed=config.seed,
    )
    _ = recipe.score_interval  # refuses an expert without steps
    if config.score_floor != "boundary" and expert != "high":
        raise UserError(
            f"--score-floor: found {config.score_floor} with --boundary-type {expert}; it is a "
            "choice for the high-noise expert alone. Leave it out."
        )
    _refuse_captions_alone(config, spec, data, recipe)
    objective = Distillation(
        recipe=recipe,
        gen_update_interval=config.gen_update_interval,
        uniform_sampling=config.uniform_sampling,
        learning_rates={GENERATOR: config.learning_rate, CRITIC: config.learning_rate_critic},
    )
    return plan_run(config, spec, data, objective)


def _refuse_captions_alone(
    config: DistillConfig, spec: ModelSpec, data: Dataset, recipe: Recipe
) -> None:
    """Samples that are captions without a medium train only what begins and ends in noise."""
    have = captions_alone(spec, data)
    if have is None:
        return
    if recipe.start == "latents":
        given = "" if config.start else f", the default of the {recipe.expert}-noise expert"
        raise UserError(
            f"--start: latents{given}, but {have}. Begin from noise: --start noise; or encode the "
            "media into a folder of their own, or leave them out (--where 'type!=text')."
        )
    if recipe.fm_loss_weight:
        raise UserError(
            f"--fm-loss-weight: {recipe.fm_loss_weight:g}, but {have}, which this loss learns "
            "from. Leave it out, or encode the media into a folder of their own."
        )
