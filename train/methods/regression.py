"""Trajectory regression as an objective: a student that learns its teacher's own steps.

Between two of the student's levels the teacher's path is a curve; what leads from one end of it to
the other in one Euler step is its mean slope, (x_k − x_{k+1}) / (σ_k − σ_{k+1}). The shards have
the states x_k (`wantrain synthesize --states`), so there is no critic, no teacher and no rollout:
one pass with a gradient for each sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shared.device import to_device
from shared.models.spec import TIMESTEPS
from train.data.batches import Batch
from train.functional.losses import regression_loss
from train.functional.rng import spread
from train.functional.schedule import Schedule, per_sample
from train.methods.base import Method, OneRole, few_steps
from train.methods.flow_matching import over_frames, walk
from train.methods.step_output import StepOutput
from train.model.roles import GENERATOR, Roles
from train.options import Expert


@dataclass(frozen=True, kw_only=True)
class Regression(OneRole):
    """Objective of `wantrain distill --method regression`."""

    expert: Expert
    schedule: Schedule
    strata: int
    """Samples in a row that share out the expert's steps evenly: those of an update, or 1."""
    uniform_sampling: bool
    learning_rates: Mapping[str, float]
    seed: int
    main_role: str = GENERATOR
    method: Method = "distill"
    first_noise: None = None

    @property
    def steps(self) -> range:
        """Positions of the steps that are learned, each once in as many samples."""
        return self.schedule.owned_steps(self.expert)

    @property
    def states(self) -> range:
        """Those of the steps, and where the last one leads, unless that is the clip itself."""
        steps = self.steps
        return range(steps.start, min(steps.stop + 1, len(self.schedule.indices)))

    def loss(self, roles: Roles, role: str, batch: Batch, negative: torch.Tensor) -> StepOutput:
        """mean (v̂(x_k, σ_k) − (x_k − x_{k+1}) / (σ_k − σ_{k+1}))², k drawn for each sample."""
        assert batch.states is not None
        device = batch.latents.device
        path = [*batch.states.unbind(1), batch.latents]
        share = spread(self.seed, "step", batch.update, batch.samples, self.strata)
        places = [min(int(part * len(self.steps)), len(self.steps) - 1) for part in share.tolist()]
        x_k, x_next = (
            torch.stack([path[place + ahead][row] for row, place in enumerate(places)])
            for ahead in (0, 1)
        )
        # float64 until a level is rounded once, as a sampler's is
        sigmas = torch.tensor([*self.schedule.sigmas, 0.0], dtype=torch.float64)
        own = self.steps.start + torch.tensor(places)
        sigma, fall = sigmas[own], sigmas[own] - sigmas[own + 1]
        target = (x_k - x_next) / per_sample(to_device(fall.float(), device))
        level = to_device(sigma.float(), device)
        timestep = to_device((TIMESTEPS * sigma).float(), device)
        _, timesteps = over_frames(batch, level, timestep)
        with roles.role(role):
            v = roles.velocity(x_k, timesteps, batch.text, batch.condition, batch.image)
        u = torch.tensor(self.schedule.indices, dtype=torch.float64)[own] / TIMESTEPS
        return StepOutput(
            loss=regression_loss(v, target, batch.noised),
            u=to_device(u.float(), device),
            sigma=level,
        )

    @property
    def samples_from_latents(self) -> bool:
        return self.steps.start > 0  # it never sees pure noise

    @torch.no_grad()
    def sample(self, roles: Roles, batch: Batch, negative: torch.Tensor) -> torch.Tensor:
        """x̂0 at the last own step, by Euler from noise or from the teacher's state there."""

        def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
            return roles.velocity(x_t, timestep, batch.text, batch.condition, batch.image)

        state = None
        if self.samples_from_latents:
            assert batch.states is not None
            state = batch.states[:, 0]
        with roles.role(self.main_role):
            return walk(
                batch,
                [self.schedule.sigmas[step] for step in self.steps],
                predict,
                lambda _: batch.noise(self.seed, "validation"),
                from_latents=False,
                renoise=False,
                state=state,
            )

    def identity(self) -> dict[str, Any]:
        return {
            "method": "regression",
            "boundary_type": self.expert,
            "denoising_step_indices_list": list(self.schedule.indices),
            "flow_shift": self.schedule.shift,
            "pairing": "euler",
            "uniform_sampling": self.uniform_sampling,
        }

    def sampling(self) -> dict[str, Any]:
        """Euler: away from the clip a step's velocity leads to the next state, not to x̂0."""
        return few_steps(self.schedule, "euler")

    def describe(self) -> list[str]:
        return [
            f"steps    {self.schedule.describe(self.expert)}, and learns each as the teacher's "
            "path goes, without a critic; sample with Euler"
        ]
