"""Flow matching with a shifted schedule. Pure functions and one frozen value.

x_t = (1 − σ)·x0 + σ·ε,  v = ε − x0,  t = 1000·σ. Sigmas and timesteps are kept as floats: an int64
timestep turns 937.5 into 937, a bf16 one into 936, and neither is what the model was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.errors import UserError
from shared.models.spec import TIMESTEPS
from train.options import Expert, ScoreFloor

# In the command line's order: typing keeps one Optional[Literal] for all orders, the first it saw.
Value = TypeVar("Value", torch.Tensor, float)

# Levels nearer to pure noise say nothing about x̂0 and levels below divide by almost nothing. The
# floor is on σ, after the shift: in u it would keep the low expert from ever seeing σ < 0.2 at
# shift 12.
MAX_SCORE_U = 0.98
MIN_SCORE_SIGMA = 0.02


def shift_sigma(u: Value, shift: float) -> Value:
    """σ = s·u / (1 + (s−1)·u): the schedule's time u in [0, 1] to a noise level in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The u whose shifted level is `sigma`: u = σ / (s − (s−1)·σ)."""
    return sigma / (shift - (shift - 1) * sigma)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t for latents (B, C, T, H, W) and σ broadcastable to them."""
    return (1 - sigma) * x0 + sigma * noise


def x0_from_velocity(x_t: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x̂0 = x_t − σ·v."""
    return x_t - sigma * v


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance u + w·(c − u); w = 1 is the conditional prediction."""
    return uncond + scale * (cond - uncond)


def per_sample(values: torch.Tensor) -> torch.Tensor:
    """(B,) → (B, 1, 1, 1, 1), to broadcast over latents."""
    return values.reshape(-1, 1, 1, 1, 1)


def expert_interval(expert: Expert, shift: float, boundary: float | None) -> tuple[float, float]:
    """(low, high) of u at which an expert works: σ ≥ boundary is high.

    UserError where the model has no such expert.
    """
    if expert == "full":
        return 0.0, 1.0
    if boundary is None:
        raise UserError(
            f"--boundary-type {expert}: this model has one transformer and no boundary; "
            "use --boundary-type full."
        )
    edge = unshift_sigma(boundary, shift)
    return (0.0, edge) if expert == "low" else (edge, 1.0)


def even_levels(steps: int, shift: float) -> tuple[float, ...]:
    """σ of `steps` even steps of u from 1 to 0, shifted, as Wan's own sampler has them."""
    return tuple(shift_sigma(1 - step / steps, shift) for step in range(steps))


def turns(sigmas: Sequence[float], boundary: float | None) -> tuple[tuple[Expert, range], ...]:
    """Whose turn it is at falling levels, and the places that are its; none without a place."""
    if boundary is None:
        return (("full", range(len(sigmas))),)
    high = sum(TIMESTEPS * sigma >= boundary * TIMESTEPS for sigma in sigmas)
    both: tuple[tuple[Expert, range], ...] = (
        ("high", range(high)),
        ("low", range(high, len(sigmas))),
    )
    return tuple((expert, places) for expert, places in both if places)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The few steps that the student will take, and which expert owns which."""

    indices: tuple[float, ...]
    """Raw list, strictly falling, in (0, 1000]: `denoising_step_indices_list` of the seed."""
    shift: float
    boundary: float | None
    """Share of the timesteps at and above which the high-noise expert works."""

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.indices, self.indices[1:], strict=False))
        if not self.indices or not falling or not 0 < self.indices[-1] <= self.indices[0] <= 1000:
            raise UserError(
                f"--denoising-step-indices-list: found {list(self.indices)}, expected numbers "
                "falling from at most 1000 to above 0, e.g. 1000 750 500 250."
            )
        if self.shift <= 0:
            raise UserError(f"--flow-shift: found {self.shift}, expected a number above 0.")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each step, float64."""
        return tuple(shift_sigma(i / TIMESTEPS, self.shift) for i in self.indices)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The transformer's timestep at each step, 0..1000, float64."""
        return tuple(TIMESTEPS * sigma for sigma in self.sigmas)

    def owned_steps(self, expert: Expert) -> range:
        """Positions of the expert's steps: t ≥ boundary·1000 is high. UserError if it owns none."""
        expert_interval(expert, self.shift, self.boundary)  # refuses one that there is not
        if expert == "full":
            return range(len(self.indices))
        assert self.boundary is not None
        limit = self.boundary * TIMESTEPS
        high = sum(t >= limit for t in self.timesteps)
        owned = range(high) if expert == "high" else range(high, len(self.indices))
        if not owned:
            listed = ", ".join(f"{t:.1f}" for t in self.timesteps)
            raise UserError(
                f"--boundary-type {expert}: no step belongs to this expert. The timesteps are "
                f"{listed} (shift {self.shift:g}) and the boundary is {limit:g}; "
                "change --denoising-step-indices-list or --flow-shift."
            )
        return owned

    def score_interval(
        self, expert: Expert, floor: ScoreFloor, *, capped: bool = True
    ) -> tuple[float, float]:
        """(low, high) of u from which score levels are drawn for the expert.

        `floor` matters only for the high-noise expert: its levels end at the model's boundary,
        or at the level where the student hands over to the low-noise expert. Without `capped` the
        levels reach pure noise.
        """
        owned = self.owned_steps(expert)
        top = MAX_SCORE_U if capped else 1.0
        edge, end = expert_interval(expert, self.shift, self.boundary)
        if expert != "high":
            return edge, min(end, top)
        if floor == "handover" and owned.stop < len(self.indices):
            edge = self.indices[owned.stop] / TIMESTEPS
        if edge >= top:
            raise UserError(
                f"--boundary-type high: the score interval is empty: it starts at u={edge:.3f} "
                f"(boundary {self.boundary:g}, shift {self.shift:g}), its cap is {top:g}."
            )
        return edge, top

    def score_sigma(self, u: torch.Tensor, *, floored: bool = True) -> torch.Tensor:
        """Noise level at which scores are compared, for u drawn from `score_interval`."""
        sigma = shift_sigma(u, self.shift)
        return sigma.clamp_min(MIN_SCORE_SIGMA) if floored else sigma
