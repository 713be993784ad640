"""Flow matching: which noise levels a model is taught at, and how wrong its velocities are there.

No optimizer, no I/O, no state. Everything random is drawn from (seed, purpose, update, sample).
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch

from shared.device import to_device
from shared.errors import UserError
from shared.models.spec import TIMESTEPS
from train.data.batches import Batch
from train.functional.guidance import Guidance, GuidanceTable
from train.functional.losses import flow_matching_loss
from train.functional.rng import spread
from train.functional.schedule import (
    add_noise,
    expert_interval,
    guide,
    per_sample,
    shift_sigma,
    x0_from_velocity,
)
from train.methods.step_output import StepOutput
from train.model.roles import Roles
from train.options import Expert, TimestepSampling

# Of a distribution that lies elsewhere, so little is left in an expert's interval that float64
# no longer tells its levels apart.
LEAST_SHARE = 1e-6
FIRST_NOISE = "noise"
"""Stream of the noise of `flow_matching_step`."""


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """How σ is distributed: u in [0, 1] is drawn, shifted, and kept on the expert's side.

    What is drawn is the distribution of the whole model, given that the level is the expert's: its
    shape stays, its mass is 1 again. Trained apart, two experts so learn what one model would.
    """

    expert: Expert
    shift: float
    boundary: float | None
    sampling: TimestepSampling
    """Of u, before the shift: uniform, or sigmoid(mean + std·n) with normal n."""
    mean: float
    std: float

    def __post_init__(self) -> None:
        below, above = self._shares
        if above - below < LEAST_SHARE:
            low, high = self.timesteps
            raise UserError(
                f"--logit-mean: found {self.mean:g} with --logit-std {self.std:g}, whose levels "
                f"lie outside of t {low:g} to {high:g}, where the {self.expert}-noise expert works "
                f"(shift {self.shift:g}). Choose a mean nearer to 0 or a larger deviation."
            )

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of u."""
        return expert_interval(self.expert, self.shift, self.boundary)

    @property
    def timesteps(self) -> tuple[float, float]:
        """(low, high) of t = 1000·σ."""
        low, high = (TIMESTEPS * shift_sigma(u, self.shift) for u in self.interval)
        return low, high

    @cached_property
    def _shares(self) -> tuple[float, float]:
        """Cumulative probability at both ends of the interval."""
        ends = torch.tensor(self.interval, dtype=torch.float64)
        if self.sampling == "logit-normal":
            ends = torch.special.ndtr((torch.logit(ends) - self.mean) / self.std)
        low, high = ends.tolist()
        return low, high

    def sigma(self, quantile: torch.Tensor) -> torch.Tensor:
        """(B,) fp32 noise levels for quantiles (B,) in [0, 1]; float64 inside."""
        below, above = self._shares
        u = below + (above - below) * quantile.double()
        if self.sampling == "logit-normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        # The inverse returns to the ends only up to rounding.
        return shift_sigma(u.clamp(*self.interval), self.shift).float()


@dataclass(frozen=True)
class Level:
    """One noise level for each sample: σ and t = 1000·σ over frames, and the noise."""

    sigma: torch.Tensor
    timestep: torch.Tensor
    noise: torch.Tensor

    @property
    def of_samples(self) -> torch.Tensor:
        """σ (B,), also where some frames are kept clean."""
        return self.sigma.flatten(1).amax(dim=1)


def over_frames(
    batch: Batch, sigma: float | torch.Tensor, timestep: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A level, one for all samples or (B,), as the batch's frames have it.

    σ (B, 1, 1, 1, 1) and t (B,); with frames that are kept clean σ (B, 1, T, 1, 1) and t (B, T),
    both 0 there: x_t is then the frame itself, and so is x̂0.
    """
    device, samples = batch.latents.device, len(batch.samples)
    spread = [
        value.float().expand(samples)
        if isinstance(value, torch.Tensor)
        else torch.full((samples,), value, dtype=torch.float32, device=device)
        for value in (sigma, timestep)
    ]
    if batch.noised is None:
        return per_sample(spread[0]), spread[1]
    sigmas, timesteps = (per_sample(value) * batch.noised for value in spread)
    return sigmas, timesteps[:, 0, :, 0, 0]


def velocity_loss(
    roles: Roles,
    role: str,
    batch: Batch,
    x0: torch.Tensor,
    level: Level,
) -> torch.Tensor:
    """How far a role is from the velocities that lead to `x0`, scalar with a graph.

    `x0` (B, C, T, H, W) fp32; text and conditions are the batch's.
    """
    x_t = add_noise(x0, level.noise, level.sigma)
    with roles.role(role):
        v = roles.velocity(x_t, level.timestep, batch.text, batch.condition, batch.image)
    return flow_matching_loss(v, level.noise, x0, batch.noised)


def flow_matching_step(
    roles: Roles, role: str, levels: NoiseLevels, batch: Batch, *, strata: int, seed: int
) -> StepOutput:
    """One micro-step on the cached latents.

    The levels of `strata` samples in a row are spread evenly over the distribution; 1: each is
    drawn independently. Call `backward` inside the role.
    """
    quantiles = spread(seed, "level", batch.update, batch.samples, strata)
    sigma = to_device(levels.sigma(quantiles), batch.latents.device)
    loss = loss_at(roles, role, batch, sigma, batch.noise(seed, FIRST_NOISE))
    return StepOutput(loss=loss, u=sigma / (levels.shift - (levels.shift - 1) * sigma), sigma=sigma)


def loss_at(
    roles: Roles, role: str, batch: Batch, sigma: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Of the cached latents at levels σ (B,), scalar with a graph. `noise` as the latents."""
    level = Level(*over_frames(batch, sigma, TIMESTEPS * sigma), noise)
    return velocity_loss(roles, role, batch, batch.latents, level)


def guided_velocity(
    roles: Roles,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    batch: Batch,
    negative: torch.Tensor,
    scale: Guidance,
    *,
    batched: bool = False,
) -> torch.Tensor:
    """v̂ of the active role with classifier-free guidance, (B, C, T, H, W) fp32.

    A scale of 0 or 1 is no guidance, only the conditional prediction; a table is read at each
    sample's σ. `timestep` (B,) or (B, T), `negative` (tokens, D). `batched`: one pass of 2B
    samples, the conditional ones first, in place of two passes of B; equal but for rounding.
    """
    if scale in (0, 1):
        return roles.velocity(x_t, timestep, batch.text, batch.condition, batch.image)
    unconditional = negative.expand(len(batch.samples), -1, -1)
    if batched:
        condition, image = (
            None if one is None else torch.cat([one, one]) for one in (batch.condition, batch.image)
        )
        text = torch.cat([batch.text, unconditional])
        v, v_unconditional = roles.velocity(
            torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), text, condition, image
        ).chunk(2)
    else:
        v, v_unconditional = (
            roles.velocity(x_t, timestep, text, batch.condition, batch.image)
            for text in (batch.text, unconditional)
        )
    if isinstance(scale, GuidanceTable):
        # Frames that are kept clean are at 0.
        sigma = timestep.reshape(len(timestep), -1).amax(dim=1) / TIMESTEPS
        return guide(v, v_unconditional, per_sample(scale.at(sigma)))
    return guide(v, v_unconditional, scale)


Predict = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""v̂ (B, C, T, H, W) fp32 of x_t, the timestep (as `over_frames` gives it), the level's place."""


def walk(
    batch: Batch,
    sigmas: Sequence[float],
    predict: Predict,
    fresh_noise: Callable[[int], torch.Tensor],
    *,
    from_latents: bool,
    renoise: bool,
    state: torch.Tensor | None = None,
    end: float | None = None,
) -> torch.Tensor:
    """x̂0 at the last of falling noise levels, (B, C, T, H, W) fp32.

    It begins as noise, or `from_latents` as the batch's, noised to the first level, or as `state`,
    which is at that level. `fresh_noise` gives noise (B, C, T, H, W) for a place. Steps are
    `trajectory`'s. With `end` the last step leads to that level, and what is there is returned.
    """
    x_t = fresh_noise(0) if state is None else state
    if from_latents:
        x_t = add_noise(batch.latents, x_t, over_frames(batch, sigmas[0], TIMESTEPS * sigmas[0])[0])
    else:
        x_t = with_clean_frames(batch, x_t)
    stops = sigmas if end is None else [*sigmas, end]
    path = trajectory(batch, stops, x_t, predict, fresh_noise, renoise=renoise)
    return next(islice(path, len(sigmas), None))


def with_clean_frames(batch: Batch, x_t: torch.Tensor) -> torch.Tensor:
    """`x_t` (B, C, T, H, W) with the frames that are kept clean as they are cached."""
    return x_t if batch.noised is None else torch.where(batch.noised > 0, x_t, batch.latents)


def trajectory(
    batch: Batch,
    sigmas: Sequence[float],
    x_t: torch.Tensor,
    predict: Predict,
    fresh_noise: Callable[[int], torch.Tensor],
    *,
    renoise: bool,
    first: int = 0,
) -> Generator[torch.Tensor, None, None]:
    """x_t (B, C, T, H, W) fp32 at each of falling noise levels from place `first` on, then x̂0.

    It begins with `x_t` at `sigmas[first]`; each is given before the model sees it. A step leads to
    the next level with that on x̂0 (`renoise`, LCM sampling), or along v̂ (Euler).
    """
    levels = [over_frames(batch, sigma, TIMESTEPS * sigma) for sigma in sigmas]
    for place in range(first, len(levels)):
        yield x_t
        sigma, timestep = levels[place]
        v = predict(x_t, timestep, place)
        x0 = x0_from_velocity(x_t, v, sigma)
        if place + 1 == len(levels):
            yield x0
            return
        following, _ = levels[place + 1]
        if renoise:
            x_t = add_noise(x0, fresh_noise(place + 1), following)
        else:
            x_t = x_t + (following - sigma) * v
