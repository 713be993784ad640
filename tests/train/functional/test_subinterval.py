"""Noise on top of noise, on distributions where everything is known: float64, by other routes."""

import numpy as np
import pytest
import torch

from train.functional.subinterval import (
    add_noise_to_state,
    coefficients,
    state_mean,
    state_velocity,
    state_weight,
)

LEVELS = [(0.0, 0.3), (0.5, 0.5001), (0.5, 0.7), (0.8, 0.97), (0.833, 1.0)]


def one(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64)


@pytest.mark.parametrize(("s", "t"), LEVELS)
def test_noising_twice_is_noising_once(s: float, t: float) -> None:
    """x_s = (1−s)·x0 + s·ε, then on to t: mean (1−t)·x0 and variance t²."""
    a, b = coefficients(one(s), one(t))
    assert a.item() * (1 - s) == pytest.approx(1 - t, abs=1e-15)
    assert (a * s).item() ** 2 + b.item() ** 2 == pytest.approx(t**2, rel=1e-14)
    x_s, noise = torch.randn(2, 2, 3, 2, 2, 3, dtype=torch.float64)
    assert torch.equal(add_noise_to_state(x_s, noise, one(s), one(t)), a * x_s + b * noise)
    # What cancels in b² = t² − a²·s² does not in fp32 here.
    _, single = coefficients(one(s).float(), one(t).float())
    assert single.item() == pytest.approx(b.item(), rel=2e-4 if t - s < 1e-3 else 1e-6)


class Gaussian:
    """Correlated clips of three numbers; of the student's hand-over state any mean and covariance.

    x_s is no noised clip here: its covariance is not (1−s)²·C + s²·I of any C ≥ 0.
    """

    def __init__(self, s: float) -> None:
        rng = np.random.default_rng(5)
        root = rng.normal(size=(3, 3))
        self.s, self.mean = s, rng.normal(size=3)
        self.covariance = 0.05 * root @ root.T + 0.1 * np.eye(3)
        assert np.linalg.eigvalsh(self.covariance)[0] < s**2

    def marginal(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of x_t."""
        a = (1 - t) / (1 - self.s)
        b2 = t**2 - a**2 * self.s**2
        return a * self.mean, a**2 * self.covariance + b2 * np.eye(3)

    def velocity(self, t: float, x: np.ndarray) -> np.ndarray:
        """Of the flow through the marginals, from the score: v = −(x + t·∇log q) / (1 − t).

        (At t = 1, its limit.) Marginals of this velocity's flow are checked below.
        """
        mean, covariance = self.marginal(t)
        score = -np.linalg.solve(covariance, (x - mean).T).T
        return -(x + t * score) / (1 - t)


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.52), (0.5, 0.7), (0.8, 0.97)])
def test_the_regression_has_the_velocity_of_the_marginal_as_its_minimiser(
    s: float, t: float
) -> None:
    """Of jointly Gaussian (x_s, ε) the best predictor of the target from x_t is linear:
    E[y] + Cov(y, x_t)·Cov(x_t)⁻¹·(x_t − E[x_t]). It is found from the code's own target, whose
    dependence on (x_s, ε) is read off by unit vectors, and compared with the closed form."""
    toy = Gaussian(s)
    unit = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1, 1)
    nought = torch.zeros_like(unit)
    of_state, of_noise = (
        state_velocity(x, e, one(s), one(t)).view(3, 3).numpy()
        for x, e in ((unit, nought), (nought, unit))
    )
    a, b = (value.item() for value in coefficients(one(s), one(t)))
    mean, covariance = toy.marginal(t)
    crossed = a * of_state @ toy.covariance + b * of_noise  # Cov(y, x_t)
    slope = crossed @ np.linalg.inv(covariance)
    x = np.random.default_rng(1).normal(size=(5, 3))
    predicted = of_state @ toy.mean + (x - mean) @ slope.T
    np.testing.assert_allclose(predicted, toy.velocity(t, x), rtol=1e-9)

    # The biased target ε − x_s, which takes the state for a clip, has another.
    biased = (b * np.eye(3) - a * toy.covariance) @ np.linalg.inv(covariance)
    wrong = -toy.mean + (x - mean) @ biased.T
    assert np.abs(wrong - toy.velocity(t, x)).max() > 0.3


@pytest.mark.parametrize("s", [0.5, 0.8])
def test_that_velocity_carries_the_marginals_into_one_another(s: float) -> None:
    """Continuity: dμ/dt = E[v] and dΣ/dt = Cov(v, x) + Cov(x, v), by central differences."""
    toy, t, h = Gaussian(s), 0.9, 1e-5
    (m0, c0), (m1, c1), (mean, covariance) = (toy.marginal(u) for u in (t - h, t + h, t))
    at_mean = toy.velocity(t, mean[None])[0]
    slope = np.stack([toy.velocity(t, (mean + e)[None])[0] - at_mean for e in np.eye(3)], axis=1)
    np.testing.assert_allclose((m1 - m0) / (2 * h), at_mean, rtol=1e-6)
    moved = slope @ covariance + covariance @ slope.T
    np.testing.assert_allclose((c1 - c0) / (2 * h), moved, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.5, 0.52), (0.8, 0.97)])
def test_state_mean_is_that_of_the_joint_gaussian(s: float, t: float) -> None:
    """E[x_s | x_t] through x̂0 = x_t − t·v, against conditioning (x_s, x_t) directly."""
    toy = Gaussian(0.5)
    toy.s = s
    a = coefficients(one(s), one(t))[0].item()
    mean, covariance = toy.marginal(t)
    x = np.random.default_rng(2).normal(size=(5, 3))
    expected = toy.mean + a * (x - mean) @ np.linalg.inv(covariance) @ toy.covariance
    x_t = torch.from_numpy(x).view(5, 3, 1, 1, 1)
    x0 = torch.from_numpy(x - t * toy.velocity(t, x)).view(5, 3, 1, 1, 1)
    found = state_mean(x_t, x0, one(s), one(t)).view(5, 3).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_weight_bounds_the_targets_size_and_nothing_overflows() -> None:
    """The paper's b²·clamp(1/b², 0, 10); at t = s, where b is 0, and on clean frames no NaN."""
    for t in (0.501, 0.51, 0.6, 0.9):
        b2 = t**2 - ((1 - t) / 0.5) ** 2 * 0.25
        expected = b2 * min(10, 1 / b2)
        assert state_weight(one(0.5), one(t)).item() == pytest.approx(expected, rel=1e-12)
    s = one(0.5).float()
    x, noise = torch.randn(2, 1, 3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for t in (0.5, 0.5000001, 0.501, 1.0):
        end = torch.full_like(s, t)
        error = state_weight(s, end) * state_velocity(x, noise, s, end).square()
        assert torch.isfinite(error).all() and error.max() < 200
    clean = torch.zeros_like(s)
    for value in (
        state_velocity(x, noise, clean, clean),
        state_mean(x, x, clean, clean),
        add_noise_to_state(x, noise, clean, clean),
    ):
        assert torch.isfinite(value).all()


def test_from_level_0_it_is_flow_matching() -> None:
    x0, noise = torch.randn(2, 2, 3, 2, 2, 3, dtype=torch.float64)
    t = one(0.4)
    assert torch.allclose(add_noise_to_state(x0, noise, one(0), t), 0.6 * x0 + 0.4 * noise)
    assert torch.allclose(state_velocity(x0, noise, one(0), t), noise - x0)
    assert torch.allclose(state_mean(noise, x0, one(0), t), x0)
