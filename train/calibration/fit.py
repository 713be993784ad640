"""w*(σ) from sums over clips. numpy, float64, no model.

At one level, with d = x̂0_cond − x̂0_uncond and r = x0 − x̂0_cond, the clip's squared error under
guidance w is ‖r − (w − 1)·d‖² = ⟨r, r⟩ − 2·(w − 1)·⟨r, d⟩ + (w − 1)²·⟨d, d⟩. Over all clips it is
least at w* = 1 + Σ⟨r, d⟩ / Σ⟨d, d⟩.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import UserError

Array = npt.NDArray[np.float64]

MOST_SPREAD = 0.5
"""Standard error of a scale that is not used: near σ = 0 both predictions are the clip, d is almost
nothing, and w* is noise divided by it."""
_UNKNOWN = 1e6  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Inner products of each clip at each level, (clips, levels)."""

    rr: Array
    rd: Array
    dd: Array

    def error(self, scales: Array | float) -> Array:
        """(levels) squared error under these scales, relative to that without guidance."""
        more = scales - 1
        total = self.rr.sum(0) - 2 * more * self.rd.sum(0) + more**2 * self.dd.sum(0)
        return total / self.rr.sum(0)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One number a level."""

    measured: Array
    """w*, as it comes."""
    spread: Array
    """Its standard error over clips."""
    scales: Array
    """w*, where its standard error is above `MOST_SPREAD` that of the levels beside it."""


def fit(sums: Sums, sigmas: Array) -> Fit:
    """w* of each level. UserError where clips say nothing about it at any level.

    The standard error is the ratio estimator's (Cochran, Sampling Techniques, 3rd ed., 6.4):
    √(n / (n − 1) · Σ(⟨r, d⟩ − (w* − 1)·⟨d, d⟩)²) / Σ⟨d, d⟩ over n clips.
    """
    clips = len(sums.rd)
    along, length = sums.rd.sum(0), sums.dd.sum(0)
    known = length > 0
    safe = np.where(known, length, 1.0)
    more = np.where(known, along / safe, 0.0)
    rest = ((sums.rd - more * sums.dd) ** 2).sum(0)
    spread = np.where(known, np.sqrt(clips / (clips - 1) * rest) / safe, _UNKNOWN)
    spread = np.minimum(spread, _UNKNOWN)
    fine = spread <= MOST_SPREAD
    if not fine.any():
        raise UserError(
            f"--clips: {clips} clips leave w uncertain by {spread.min():.2f} at the best level, "
            f"expected at most {MOST_SPREAD}. Measure on more clips, and on clips that were made "
            "with CFG: without it caption and negative prompt hardly differ."
        )
    measured = 1 + more
    return Fit(
        measured=measured,
        spread=spread,
        scales=np.where(fine, measured, np.interp(sigmas, sigmas[fine], measured[fine])),
    )
