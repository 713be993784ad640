"""The reference of the gauges: what the guided teacher makes in the student's place."""

import torch

from train.data.batches import Batch
from train.functional.schedule import x0_from_velocity
from train.methods.dmd import Recipe, first_state, rollout_noise
from train.methods.flow_matching import guided_velocity, over_frames, walk
from train.methods.gauges import measures_of
from train.model.roles import Roles

FINISHING_STEPS = 4
"""From the student's last step to a clip."""


def ends_in_clips(recipe: Recipe) -> bool:
    """Whether x̂0 of the last step is the clip, with no other expert to come."""
    return recipe.walk[-1] == len(recipe.schedule.indices) - 1


def gauge_passes(recipe: Recipe) -> int:
    """Passes of the transformer in `teacher_gauges`."""
    guided = 1 if recipe.real_guidance_scale in (0, 1) else 2
    exits, finishing = len(recipe.walk), FINISHING_STEPS - 1
    if not ends_in_clips(recipe):
        return (guided + 1) * exits
    return (guided + 1) * (exits - 1) + guided * (1 + finishing)


@torch.no_grad()
def teacher_gauges(
    roles: Roles, recipe: Recipe, batch: Batch, negative: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Name → (B,), in the order of the steps: `measures_of` what the teacher has at each of them.

    It walks by Euler steps with the guidance that the student learns, from noise of a stream of its
    own. At a step its x̂0 is measured *without* guidance: with it, that of high noise has far more
    contrast than clips (2.6 times at pure noise and scale 6 on the toy). The last step's x̂0 is the
    student's clip, so the teacher's is finished, down to σ = 0. `negative`: (tokens, D).
    """
    steps = list(recipe.walk)
    sigmas = [recipe.schedule.sigmas[step] for step in steps]
    timesteps = [recipe.schedule.timesteps[step] for step in steps]
    finishes = ends_in_clips(recipe)
    if finishes:
        last = sigmas[-1]
        sigmas += [last * (1 - part / FINISHING_STEPS) for part in range(1, FINISHING_STEPS)]
    measured: dict[str, torch.Tensor] = {}

    def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
        if place < len(steps) - finishes:
            v = roles.velocity(x_t, timestep, batch.text, batch.condition, batch.image)
            x0 = x0_from_velocity(x_t, v, over_frames(batch, sigmas[place], 0.0)[0])
            measured.update(measures_of(x0, batch, timesteps[place]))
        return guided_velocity(
            roles, x_t, timestep, batch, negative, recipe.real_guidance_scale,
            batched=recipe.batched_guidance,
        )  # fmt: skip

    with roles.teacher():
        clip = walk(
            batch,
            sigmas,
            predict,
            lambda _: batch.noise(recipe.seed, rollout_noise(steps[0], "gauge")),
            from_latents=recipe.start == "latents",
            renoise=False,
            state=first_state(recipe, batch),
        )
    return measured | (measures_of(clip, batch, timesteps[-1]) if finishes else {})
