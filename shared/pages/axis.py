"""Axes with round numbers."""

import math


def nice_step(span: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, so that about `count` of them make the span."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(float(power * m) for m in (1, 2, 5, 10) if span / (power * m) <= count)
