"""w* from inner products: least squares, its standard error, and levels that say nothing."""

import numpy as np
import pytest

from shared.errors import UserError
from train.calibration.fit import Fit, Sums, fit

SIGMAS = np.array([0.1, 0.4, 0.9])


def sums_of(residuals: np.ndarray, differences: np.ndarray) -> Sums:  # type: ignore[type-arg]
    """Of vectors (clips, levels, numbers)."""
    return Sums(
        rr=(residuals**2).sum(2),
        rd=(residuals * differences).sum(2),
        dd=(differences**2).sum(2),
    )


def linear(clips: int, rng: np.random.Generator, noise: float) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """r = (w − 1)·d + noise, with w 3, 2 and 1.25 at the levels; clips of unequal weight."""
    weight = rng.uniform(0.2, 2, size=(clips, 1, 1))
    d = rng.normal(size=(clips, 3, 40)) * weight
    return (np.array([2, 1, 0.25])[None, :, None]) * d + noise * rng.normal(size=d.shape), d


def test_it_is_the_least_squares_solution_over_all_clips() -> None:
    r, d = linear(7, np.random.default_rng(1), 0.8)
    sums = sums_of(r, d)
    found = fit(sums, SIGMAS)
    for level in range(3):
        flat_d, flat_r = d[:, level].reshape(-1, 1), r[:, level].ravel()
        solution = np.linalg.lstsq(flat_d, flat_r, rcond=None)[0][0]
        assert found.scales[level] == pytest.approx(1 + solution, rel=1e-12)
        grid = np.linspace(-1, 5, 601)
        errors = [((flat_r - (w - 1) * flat_d.ravel()) ** 2).sum() for w in grid]
        assert abs(grid[int(np.argmin(errors))] - found.scales[level]) <= 0.005 + 1e-9
        expected = errors[123] / (flat_r**2).sum()
        assert sums.error(grid[123])[level] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(found.scales, found.measured)


def test_the_spread_is_that_of_repeated_measurements() -> None:
    """Over 400 sets of 24 clips: w* is right on average, and its errors are as large as said."""
    rng = np.random.default_rng(2)
    found = [fit(sums_of(*linear(24, rng, 1.0)), SIGMAS) for _ in range(400)]
    scales = np.array([one.scales for one in found])
    said = np.array([one.spread for one in found]).mean(0)
    np.testing.assert_allclose(scales.mean(0), [3, 2, 1.25], atol=4 * said.max() / 20)
    np.testing.assert_allclose(scales.std(0), said, rtol=0.12)


def test_levels_that_say_nothing_take_what_is_beside_them() -> None:
    r, d = linear(7, np.random.default_rng(3), 0.5)
    d[:, 0] *= 1e-6  # near σ = 0
    found = fit(sums_of(r, d), SIGMAS)
    assert found.spread[0] > 1e3 and found.measured[0] != found.scales[0]
    assert found.scales[0] == found.scales[1] == found.measured[1]
    d[:, 1] = 0
    found = fit(sums_of(r, d), SIGMAS)
    assert found.measured[1] == 1 and np.isfinite(found.spread).all()
    np.testing.assert_array_equal(found.scales, [found.measured[2]] * 3)
    with pytest.raises(UserError, match=r"^--clips: 7 clips leave w uncertain"):
        fit(sums_of(r, d * 1e-6), SIGMAS)


def test_the_middle_is_interpolated() -> None:
    r, d = linear(7, np.random.default_rng(4), 0.1)
    d[:, 1] *= 1e-6
    found: Fit = fit(sums_of(r, d), SIGMAS)
    low, high = found.measured[0], found.measured[2]
    assert found.scales[1] == pytest.approx(low + (high - low) * (0.4 - 0.1) / (0.9 - 0.1))
