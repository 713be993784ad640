"""Student against teacher over prompts: means, their ratio, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure, over all prompts."""

    teacher: float
    student: float
    ratio: float | None
    """student / teacher; None where the teacher's mean is 0."""
    interval: tuple[float, float] | None
    """95 % of the ratio; None for one prompt, and where some resamples of the teacher are 0."""

    def words(self) -> tuple[str, str, str, str]:
        """Teacher, student, ratio and interval, to be read."""
        ratio = "–" if self.ratio is None else f"{self.ratio:.2f}"
        low_high = "–" if self.interval is None else "{:.2f} to {:.2f}".format(*self.interval)
        return f"{self.teacher:.4g}", f"{self.student:.4g}", ratio, low_high


def compare(teacher: Sequence[float], student: Sequence[float]) -> Comparison:
    """A value a prompt of each, in the same order → means, their ratio and its interval.

    Bootstrap over prompts: both sides of a prompt are drawn together, as its difficulty is common
    to them. The same numbers give the same interval.
    """
    pairs = np.array([teacher, student], np.float64)
    means = pairs.mean(axis=1)
    prompts = pairs.shape[1]
    drawn = np.random.default_rng(SEED).integers(prompts, size=(RESAMPLES, prompts))
    below, above = pairs[:, drawn].mean(axis=2)
    interval = None
    if prompts > 1 and (below > 0).all():
        low, high = np.percentile(above / below, (2.5, 97.5))
        interval = float(low), float(high)
    return Comparison(
        teacher=float(means[0]),
        student=float(means[1]),
        ratio=float(means[1] / means[0]) if means[0] > 0 else None,
        interval=interval,
    )
