"""The reference of the gauges: the guided teacher in the student's place."""

import torch

from train.data.batches import Batch
from train.functional.schedule import x0_from_velocity
from train.methods.dmd import Recipe, first_state, rollout_noise
from train.methods.flow_matching import guided_velocity, over_frames, walk
from train.methods.gauges import measures_of
from train.model.roles import Roles


@torch.no_grad()
def teacher_gauges(
    roles: Roles, recipe: Recipe, batch: Batch, negative: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Name → (B,), in the order of the steps: `measures_of` the teacher's x̂0 at each of them.

    One rollout to the last step, with the guidance whose scores the student learns, and noise of a
    stream of its own. Two passes a step. `negative`: (tokens, D).
    """
    steps = recipe.walk
    sigmas = [recipe.schedule.sigmas[step] for step in steps]
    measured: dict[str, torch.Tensor] = {}

    def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
        v = guided_velocity(
            roles, x_t, timestep, batch, negative, recipe.real_guidance_scale,
            batched=recipe.batched_guidance,
        )  # fmt: skip
        sigma, _ = over_frames(batch, sigmas[place], 0.0)
        x0 = x0_from_velocity(x_t, v, sigma)
        measured.update(measures_of(x0, batch, recipe.schedule.timesteps[steps[place]]))
        return v

    with roles.teacher():
        walk(
            batch,
            sigmas,
            predict,
            lambda place: batch.noise(recipe.seed, rollout_noise(steps[place], "gauge")),
            from_latents=recipe.start == "latents",
            renoise=recipe.pairing == "renoise",
            state=first_state(recipe, batch),
        )
    return measured
