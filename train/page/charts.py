"""Curves of a run as SVG paths: points, running means, axes with round numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shared.pages.axis import nice_step
from shared.spread import spread_over

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
_MOST_POINTS = 400
_WINDOWS = 20
"""A running mean is over so much of the curve: one in so many of its points."""
_MOST_SMOOTH = 50

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Finite numbers over updates."""

    name: str
    updates: Numbers
    values: Numbers
    noisy: bool = True
    """Whether a running mean is drawn over its points, rather than a line through them."""

    @classmethod
    def of(
        cls, name: str, points: Sequence[tuple[int, float | None]], *, noisy: bool = True
    ) -> "Curve":
        """Points that have no finite value are left out."""
        kept = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        pairs = np.array(kept, dtype=np.float64).reshape(-1, 2)
        return cls(name, pairs[:, 0], pairs[:, 1], noisy)

    @property
    def window(self) -> int:
        """Points of a running mean."""
        return max(1, min(_MOST_SMOOTH, len(self.values) // _WINDOWS)) if self.noisy else 1

    @property
    def line(self) -> Numbers:
        """The mean of each value and of those before it, up to `window` in all."""
        sums = np.cumsum(np.concatenate([[0.0], self.values]))
        ends = np.arange(1, len(sums))
        starts = np.maximum(0, ends - self.window)
        means: Numbers = (sums[ends] - sums[starts]) / (ends - starts)
        return means

    @property
    def last(self) -> float:
        return float(self.line[-1])


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one pair of axes. At least one has a point."""

    title: str
    curves: Sequence[Curve]
    updates: int
    """Where the axis of updates ends."""
    band: tuple[float, float] | None = None
    """Where the values should be; the upper end may be infinite."""
    note: str = ""

    @cached_property
    def _range(self) -> tuple[float, float]:
        values = np.concatenate([curve.values for curve in self.curves])
        if self.band is not None:
            ends = [end for end in (*self.band, 1.0) if math.isfinite(end)]
            values = np.concatenate([values, ends])
        low, high = float(values.min()), float(values.max())
        room = 0.06 * (high - low) or abs(high) / 10 or 1.0
        return (max(0.0, low - room) if low >= 0 else low - room), high + room

    def x(self, update: float) -> float:
        return LEFT + update / max(1, self.updates) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._range
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    @property
    def y_ticks(self) -> list[float]:
        return _ticks(*self._range, 5)

    @property
    def x_ticks(self) -> list[float]:
        return [tick for tick in _ticks(0, max(1, self.updates), 6) if tick.is_integer()]

    def dots(self, curve: Curve) -> str:
        """A path of points without length, which round caps make visible."""
        return "".join(
            f"M{self.x(curve.updates[n]):.1f} {self.y(curve.values[n]):.1f}h0"
            for n in spread_over(len(curve.values), _MOST_POINTS)
        )

    def path(self, curve: Curve) -> str:
        """Through the running means."""
        line = curve.line
        return "M" + "L".join(
            f"{self.x(curve.updates[n]):.1f} {self.y(line[n]):.1f}"
            for n in spread_over(len(line), _MOST_POINTS)
        )


def _ticks(low: float, high: float, count: int) -> list[float]:
    step = nice_step(high - low, count)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
