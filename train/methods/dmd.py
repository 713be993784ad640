"""One update of each role: rollout, scores, losses. No optimizer, no I/O, no state.

Everything random is drawn from (seed, purpose, update, sample); see `train.functional.rng`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shared.device import to_device
from shared.models.spec import TIMESTEPS
from train.data.batches import Batch
from train.functional.losses import dmd_gradient, dmd_loss, mean_gap
from train.functional.rng import choice, spread
from train.functional.schedule import Schedule, add_noise, x0_from_velocity
from train.methods.flow_matching import Level, guided_velocity, over_frames, velocity_loss, walk
from train.methods.gauges import measures_of
from train.methods.step_output import StepOutput
from train.model.roles import CRITIC, GENERATOR, Roles
from train.options import Expert, Maths, Pairing, ScoreFloor, Start

# Names in trackers.
CRITIC_ERROR, TEACHER_ERROR = "balance/critic_error", "balance/teacher_error"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the maths of a step."""

    expert: Expert
    schedule: Schedule
    start: Start
    """`latents`: walk the expert's own steps, from cached real latents noised to its first one.
    `noise`: walk from pure noise at step 0 to the expert's last step, with only this expert."""
    pairing: Pairing
    """How a step leads to the next: fresh noise on x̂0 (LCM sampling) or along v (Euler)."""
    score_floor: ScoreFloor
    real_guidance_scale: float
    fake_guidance_scale: float
    """0 is no guidance here, only the conditional prediction; not the formula at w = 0."""
    maths: Maths
    """`seed`: VideoX-Fun's, but not for ti2v with a first frame, which its losses cover, and some
    details (docs/decisions.md, "--recipe seed")."""
    fm_loss_weight: float
    """Of flow matching on the cached latents in the generator's loss; 0: none."""
    score_strata: int
    """Samples of an update that share out the score interval evenly: all of it, however ranks and
    micro-steps split it. 1: each is drawn independently."""
    batched_guidance: bool
    """Conditional and unconditional prediction in one pass of both; the same but for rounding."""
    seed: int

    @property
    def walk(self) -> range:
        """Positions of the steps that a rollout may visit, in order."""
        owned = self.schedule.owned_steps(self.expert)
        if self.maths == "seed":
            return range(len(self.schedule.indices))
        return range(owned.stop) if self.start == "noise" else owned

    @property
    def score_interval(self) -> tuple[float, float]:
        """(low, high) of u from which score levels are drawn."""
        capped = self.maths == "corrected"
        return self.schedule.score_interval(self.expert, self.score_floor, capped=capped)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must match to be resumed."""
        return {
            "boundary_type": self.expert,
            "denoising_step_indices_list": list(self.schedule.indices),
            "flow_shift": self.schedule.shift,
            "start": self.start,
            "pairing": self.pairing,
            "score_floor": self.score_floor,
            "maths": self.maths,
            "real_guidance_scale": self.real_guidance_scale,
            "fake_guidance_scale": self.fake_guidance_scale,
            "fm_loss_weight": self.fm_loss_weight,
        }


@dataclass(frozen=True)
class ScoreLevel(Level):
    """Where scores are compared."""

    u: torch.Tensor
    """(B,), before the shift."""


def exit_step(recipe: Recipe, update: int) -> int:
    """The step whose x̂0 is trained on in this update, the same for all its samples."""
    return choice(recipe.walk, recipe.seed, "exit step", update)


def rollout_noise(step: int, purpose: str = "rollout") -> str:
    """Stream of the noise with which a rollout comes to a step."""
    return f"{purpose} {step}"


def rollout(
    roles: Roles,
    recipe: Recipe,
    batch: Batch,
    *,
    last: int,
    with_gradient: bool,
    purpose: str = "rollout",
) -> torch.Tensor:
    """Walk the generator to step `last`; x̂0 there, (B, C, T, H, W) fp32.

    Only the last step carries gradients: what came before is data, as at inference. `purpose`
    tells streams of noise apart.
    """
    steps = [step for step in recipe.walk if step <= last]

    def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
        gradient_here = with_gradient and place == len(steps) - 1
        with roles.generator(), torch.set_grad_enabled(gradient_here):
            return roles.velocity(x_t, timestep, batch.text, batch.condition, batch.image)

    def fresh_noise(place: int) -> torch.Tensor:
        return batch.noise(recipe.seed, rollout_noise(steps[place], purpose))

    return walk(
        batch,
        [recipe.schedule.sigmas[step] for step in steps],
        predict,
        fresh_noise,
        from_latents=recipe.start == "latents",
        renoise=recipe.pairing == "renoise",
    )


def draw_level(recipe: Recipe, batch: Batch, purpose: str = "score") -> ScoreLevel:
    """A noise level and noise for each sample, inside the expert's interval."""
    low, high = recipe.score_interval
    share = spread(
        recipe.seed, f"{purpose} level", batch.update, batch.samples, recipe.score_strata
    )
    u = to_device(low + (high - low) * share, batch.latents.device)
    sigma = recipe.schedule.score_sigma(u, floored=recipe.maths == "corrected")
    drawn = batch.noise(recipe.seed, f"{purpose} noise")
    return ScoreLevel(*over_frames(batch, sigma, TIMESTEPS * sigma), drawn, u)


def _gauges(recipe: Recipe, batch: Batch, x0: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics of x̂0 at this update's exit; see `train.methods.gauges`."""
    timestep = recipe.schedule.timesteps[exit_step(recipe, batch.update)]
    return {name: value.mean() for name, value in measures_of(x0, batch, timestep).items()}


def generator_step(
    roles: Roles, recipe: Recipe, batch: Batch, negative: torch.Tensor
) -> StepOutput:
    """One generator micro-step. `negative`: (tokens, D).

    Metrics: critic error, mean|x̂0_generated − x̂0_fake|, teacher error, the same to x̂0_real (how
    well either denoises what the generator makes), and their ratio; contrast and motion of x̂0.

    Call `backward` inside `roles.generator()`.
    """
    x0 = rollout(roles, recipe, batch, last=exit_step(recipe, batch.update), with_gradient=True)
    with torch.no_grad():
        level = draw_level(recipe, batch)
        x_t = add_noise(x0.detach(), level.noise, level.sigma)
        guided = partial(
            guided_velocity, roles, x_t, level.timestep, batch, negative,
            batched=recipe.batched_guidance,
        )  # fmt: skip
        with roles.critic():
            fake = x0_from_velocity(x_t, guided(recipe.fake_guidance_scale), level.sigma)
        with roles.teacher():
            real = x0_from_velocity(x_t, guided(recipe.real_guidance_scale), level.sigma)
        gradient = dmd_gradient(x0.detach(), real, fake, batch.noised)
        metrics = {
            CRITIC_ERROR: mean_gap(x0, fake, batch.noised),
            TEACHER_ERROR: mean_gap(x0, real, batch.noised),
            **_gauges(recipe, batch, x0),
        }
    loss = dmd_loss(x0, gradient, batch.noised)
    if recipe.fm_loss_weight:
        at = draw_level(recipe, batch, "real")
        real_flow = velocity_loss(roles, GENERATOR, batch, batch.latents, at)
        loss = loss + recipe.fm_loss_weight * real_flow
    return StepOutput(
        loss=loss,
        u=level.u,
        sigma=level.of_samples,
        metrics=metrics,
        ratios={"balance/critic_over_teacher": (CRITIC_ERROR, TEACHER_ERROR)},
    )


def critic_step(roles: Roles, recipe: Recipe, batch: Batch) -> StepOutput:
    """One critic micro-step on a fresh rollout. Metrics: contrast and motion of its x̂0.

    Call `backward` inside `roles.critic()`.
    """
    x0 = rollout(roles, recipe, batch, last=exit_step(recipe, batch.update), with_gradient=False)
    level = draw_level(recipe, batch)
    loss = velocity_loss(roles, CRITIC, batch, x0, level)
    metrics = _gauges(recipe, batch, x0)
    return StepOutput(loss=loss, u=level.u, sigma=level.of_samples, metrics=metrics)
