"""One update of each role: rollout, scores, losses. No optimizer, no I/O, no state.

Everything random is drawn from (seed, purpose, update, sample); see `train.functional.rng`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shared.device import to_device
from shared.errors import UserError
from shared.models.spec import TIMESTEPS
from train.data.batches import Batch
from train.functional.guidance import Guidance, GuidanceTable
from train.functional.losses import dmd_gradient, dmd_loss, mean_gap, regression_loss
from train.functional.rng import choice, spread
from train.functional.schedule import Schedule
from train.methods.flow_matching import Level, guided_velocity, over_frames, velocity_loss, walk
from train.methods.gauges import measures_of
from train.methods.matching import Clips, HandOver, Matching
from train.methods.step_output import StepOutput
from train.model.roles import GENERATOR, Roles
from train.options import Exits, Expert, LevelRange, Match, Maths, Pairing, ScoreFloor, Start

# Names in trackers.
CRITIC_ERROR, TEACHER_ERROR = "balance/critic_error", "balance/teacher_error"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the maths of a step."""

    expert: Expert
    schedule: Schedule
    start: Start
    """`latents`: walk the expert's own steps, from cached real latents noised to its first one.
    `states`: the same from cached states at that step. `noise`: walk from pure noise at step 0 to
    the expert's last step, with only this expert."""
    pairing: Pairing
    """How a step leads to the next: fresh noise on x̂0 (LCM sampling) or along v (Euler)."""
    match: Match = "x0"
    """What is matched: x̂0, or the state that the high-noise expert hands over (phased DMD)."""
    score_floor: ScoreFloor
    real_guidance_scale: Guidance
    """A table (`wantrain calibrate`) is read at each sample's σ."""
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
    score_levels: LevelRange = "interval"
    """`exit`: compare an x̂0 only where noise hides no more of it than its exit still had to find:
    above the next step of the whole schedule, where it is handed on to."""
    exits: Exits = "all"
    """Steps of the walk whose x̂0 is trained on."""

    @property
    def walk(self) -> range:
        """Positions of the steps that a rollout may visit, in order."""
        owned = self.schedule.owned_steps(self.expert)
        if self.maths == "seed":
            return range(len(self.schedule.indices))
        return range(owned.stop) if self.start == "noise" else owned

    @property
    def exit_steps(self) -> Sequence[int]:
        """Positions of the steps of which each update trains one."""
        return self.walk if self.exits == "all" else self.walk[-1:]

    @property
    def matching(self) -> Matching:
        if self.match == "x0":
            return Clips()
        return HandOver(self.schedule.sigmas[self.walk.stop])

    @property
    def score_interval(self) -> tuple[float, float]:
        """(low, high) of u: the expert's, in which all score levels lie."""
        capped = self.maths == "corrected"
        return self.schedule.score_interval(self.expert, self.score_floor, capped=capped)

    def score_interval_of(self, step: int) -> tuple[float, float]:
        """(low, high) of u from which score levels are drawn for the x̂0 of a step.

        UserError where `exit` leaves none of the expert's.
        """
        low, high = self.score_interval
        indices = self.schedule.indices
        if self.score_levels == "interval" or step + 1 == len(indices):
            return low, high
        following = indices[step + 1] / TIMESTEPS
        if following >= high:
            raise UserError(
                f"--score-levels: exit leaves no level for step {indices[step]:g}: they begin at "
                f"the next step, u={following:g}, and the {self.expert}-noise expert's end at "
                f"u={high:.3f}. Use --score-levels interval, or steps that are all below"
                + (" (--start latents)." if self.start == "noise" and self.expert == "low" else ".")
            )
        return max(low, following), high

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must match to be resumed.

        What a run without these choices did is left out, as checkpoints of before have it.
        """
        guidance: float | str | GuidanceTable = self.real_guidance_scale
        if isinstance(guidance, GuidanceTable):
            guidance = f"table {guidance.digest}"
        chosen: dict[str, Any] = {}
        if self.score_levels != "interval":
            chosen["score_levels"] = self.score_levels
        if self.exits != "all":
            chosen["exits"] = self.exits
        return chosen | {
            "boundary_type": self.expert,
            "denoising_step_indices_list": list(self.schedule.indices),
            "flow_shift": self.schedule.shift,
            "start": self.start,
            "pairing": self.pairing,
            **({} if self.match == "x0" else {"match": self.match}),
            "score_floor": self.score_floor,
            "maths": self.maths,
            "real_guidance_scale": guidance,
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
    return choice(recipe.exit_steps, recipe.seed, "exit step", update)


def rollout_noise(step: int, purpose: str = "rollout") -> str:
    """Stream of the noise with which a rollout comes to a step."""
    return f"{purpose} {step}"


def first_state(recipe: Recipe, batch: Batch) -> torch.Tensor | None:
    """What a rollout begins with, (B, C, T, H, W), where that is a cached state."""
    if recipe.start != "states":
        return None
    assert batch.states is not None
    return batch.states[:, 0]


def rollout(
    roles: Roles,
    recipe: Recipe,
    batch: Batch,
    *,
    last: int,
    with_gradient: bool,
    purpose: str = "rollout",
    end: float | None = None,
) -> torch.Tensor:
    """Walk the generator to step `last`; x̂0 there, (B, C, T, H, W) fp32.

    With `end` what that step makes of it at this level, where the next expert takes over. Only the
    last step carries gradients: what came before is data, as at inference. `purpose`
    tells streams of noise apart.
    """
    steps = [step for step in recipe.walk if step <= last]

    def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
        gradient_here = with_gradient and place == len(steps) - 1
        with roles.generator(), torch.set_grad_enabled(gradient_here):
            return roles.velocity(x_t, timestep, batch.text, batch.condition, batch.image)

    def fresh_noise(place: int) -> torch.Tensor:
        stops = [*steps, recipe.walk.stop]
        return batch.noise(recipe.seed, rollout_noise(stops[place], purpose))

    return walk(
        batch,
        [recipe.schedule.sigmas[step] for step in steps],
        predict,
        fresh_noise,
        from_latents=recipe.start == "latents",
        renoise=recipe.pairing == "renoise",
        state=first_state(recipe, batch),
        end=end,
    )


def draw_level(
    recipe: Recipe, batch: Batch, purpose: str = "score", *, step: int | None = None
) -> ScoreLevel:
    """A noise level and noise for each sample, inside the expert's interval.

    `step`: whose x̂0 is noised; None: a clip that no step made.
    """
    low, high = recipe.score_interval if step is None else recipe.score_interval_of(step)
    share = spread(
        recipe.seed, f"{purpose} level", batch.update, batch.samples, recipe.score_strata
    )
    u = to_device(low + (high - low) * share, batch.latents.device)
    sigma = recipe.schedule.score_sigma(u, floored=recipe.maths == "corrected")
    drawn = batch.noise(recipe.seed, f"{purpose} noise")
    return ScoreLevel(*over_frames(batch, sigma, TIMESTEPS * sigma), drawn, u)


def _gauges(recipe: Recipe, batch: Batch, x0: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics of x̂0 at this update's exit; see `train.methods.gauges`. None of states."""
    if recipe.match != "x0":
        return {}
    timestep = recipe.schedule.timesteps[exit_step(recipe, batch.update)]
    return {name: value.mean() for name, value in measures_of(x0, batch, timestep).items()}


def generator_step(
    roles: Roles, recipe: Recipe, batch: Batch, negative: torch.Tensor
) -> StepOutput:
    """One generator micro-step. `negative`: (tokens, D).

    Metrics: critic error, mean|x̂0_generated − x̂0_fake|, teacher error, the same to x̂0_real (how
    well either denoises what the generator makes), and their ratio; contrast and motion of x̂0.
    Where states are matched, x̂0 is the state.

    Call `backward` inside `roles.generator()`.
    """
    matching, step = recipe.matching, exit_step(recipe, batch.update)
    x0 = rollout(roles, recipe, batch, last=step, with_gradient=True, end=matching.end)
    with torch.no_grad():
        level = draw_level(recipe, batch, step=step)
        x_t = matching.noised(x0.detach(), level)
        guided = partial(
            guided_velocity, roles, x_t, level.timestep, batch, negative,
            batched=recipe.batched_guidance,
        )  # fmt: skip
        with roles.critic():
            fake = matching.estimate(x_t, guided(recipe.fake_guidance_scale), level)
        with roles.teacher():
            real = matching.estimate(x_t, guided(recipe.real_guidance_scale), level)
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
    matching, step = recipe.matching, exit_step(recipe, batch.update)
    x0 = rollout(roles, recipe, batch, last=step, with_gradient=False, end=matching.end)
    level = draw_level(recipe, batch, step=step)
    x_t = matching.noised(x0, level)
    with roles.critic():
        v = roles.velocity(x_t, level.timestep, batch.text, batch.condition, batch.image)
    target, weight = matching.target(x0, level)
    loss = regression_loss(v, target, batch.noised, weight)
    metrics = _gauges(recipe, batch, x0)
    return StepOutput(loss=loss, u=level.u, sigma=level.of_samples, metrics=metrics)
