"""Flow matching with a shifted schedule. Pure functions and one frozen value.

x_t = (1 − σ)·x0 + σ·ε,  v = ε − x0,  t = 1000·σ. Sigmas and timesteps are kept as floats: an int64
timestep turns 937.5 into 937, a bf16 one into 936, and neither is what the model was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

from shared.errors import UserError
from shared.models.spec import TIMESTEPS
from train.options import Expert, ScoreFloor, names

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


def steps_by_expert(sigmas: Sequence[float], boundary: float | None) -> dict[Expert, range]:
    """Expert → places in falling `sigmas` that are its: t ≥ boundary·1000 is high.

    In the order of their work, without one that has none; one transformer has no `boundary`.
    """
    if boundary is None:
        return {"full": range(len(sigmas))}
    high = sum(TIMESTEPS * sigma >= boundary * TIMESTEPS for sigma in sigmas)
    both: dict[Expert, range] = {"high": range(high), "low": range(high, len(sigmas))}
    return {expert: places for expert, places in both.items() if places}


def step_indices(text: str, option: str) -> tuple[float, ...]:
    """ "1000 750" or "1000,750" → (1000.0, 750.0). UserError naming the option for others."""
    try:
        found = tuple(map(float, names(text)))
    except ValueError:
        found = ()
    _check_indices(found, repr(text), option)
    return found


def _check_indices(found: tuple[float, ...], shown: str, option: str) -> None:
    falling = all(a > b for a, b in pairwise(found))
    if not found or not falling or not 0 < found[-1] <= found[0] <= TIMESTEPS:
        raise UserError(
            f"{option}: found {shown}, expected numbers falling from at most 1000 to above 0, "
            'e.g. "1000 750 500 250".'
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The few steps that the student will take, and which expert owns which."""

    indices: tuple[float, ...]
    """Raw list, strictly falling, in (0, 1000]: `denoising_step_indices_list` of the seed."""
    shift: float
    boundary: float | None
    """Share of the timesteps at and above which the high-noise expert works."""

    def __post_init__(self) -> None:
        _check_indices(self.indices, str(list(self.indices)), "--denoising-step-indices-list")
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
        """Positions of the expert's steps. UserError if it owns none."""
        expert_interval(expert, self.shift, self.boundary)  # refuses one that there is not
        boundary = None if expert == "full" else self.boundary
        owned = steps_by_expert(self.sigmas, boundary).get(expert)
        if owned is None:
            listed, limit = ", ".join(f"{t:.1f}" for t in self.timesteps), boundary or 0
            raise UserError(
                f"--boundary-type {expert}: no step belongs to this expert. The timesteps are "
                f"{listed} (shift {self.shift:g}) and the boundary is {limit * TIMESTEPS:g}; "
                "change --denoising-step-indices-list or --flow-shift."
            )
        return owned

    def describe(self, expert: Expert) -> str:
        """All steps, and which are the expert's, for people."""
        shown = [f"{timestep:.1f}" for timestep in self.timesteps]
        own = ", ".join(shown[step] for step in self.owned_steps(expert))
        return f"{', '.join(shown)} (shift {self.shift:g}); this expert owns {own}"

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
