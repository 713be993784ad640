"""How strongly the teacher is guided: one scale, or one for each noise level.

A guided prediction is x̂0_cond + (w − 1)·(x̂0_cond − x̂0_uncond). One w for all levels overshoots at
high noise, where a clip of the guided teacher is denoised best with less (`wantrain calibrate`).
"""

from dataclasses import dataclass
from math import isfinite

import torch

from shared.device import to_device
from shared.io.hashing import digest_of


@dataclass(frozen=True, kw_only=True)
class GuidanceTable:
    """w(σ): linear between its levels, constant beyond them. ValueError where it is no table."""

    sigmas: tuple[float, ...]
    """Rising, in [0, 1]."""
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not self.sigmas or not rising or not 0 <= self.sigmas[0] <= self.sigmas[-1] <= 1:
            raise ValueError(f"sigmas are {list(self.sigmas)}, expected rising ones from 0 to 1")
        if len(self.scales) != len(self.sigmas) or not all(map(isfinite, self.scales)):
            raise ValueError(f"scales are {list(self.scales)}, expected a number for each sigma")

    @property
    def digest(self) -> str:
        """Of what it does to the maths."""
        return digest_of([list(self.sigmas), list(self.scales)])

    def at(self, sigma: torch.Tensor) -> torch.Tensor:
        """(B,) fp32 scales for levels (B,)."""
        points = torch.tensor([self.sigmas, self.scales], dtype=torch.float32)
        sigmas, scales = to_device(points, sigma.device)
        # Each piece adds its rise, as far as σ has come in it.
        come = ((sigma[:, None] - sigmas[:-1]) / sigmas.diff()).clamp(0, 1)
        return scales[0] + (come * scales.diff()).sum(dim=1)


Guidance = float | GuidanceTable
"""A number is the scale at every level."""
