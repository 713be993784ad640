"""A few of many, spread over them all."""

import numpy as np
import numpy.typing as npt


def spread_over(number: int, most: int) -> npt.NDArray[np.intp]:
    """Places in `number` things, rising: all, or `most` of them from the first to the last."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(np.intp)
