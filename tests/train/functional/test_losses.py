"""The losses against a float64 derivation that shares no code, and against finite differences."""

import numpy as np
import torch

from train.functional.losses import dmd_gradient, dmd_loss, flow_matching_loss

SHAPE = (3, 4, 2, 6, 5)


def _three(seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=rng) for _ in range(3)]


def test_dmd_gradient_is_the_formula_in_float64() -> None:
    generated, real, fake = _three(0)
    expected = np.empty(SHAPE)
    for sample in range(SHAPE[0]):
        g, r, f = (t[sample].numpy().astype(np.float64) for t in (generated, real, fake))
        expected[sample] = (f - r) / max(np.abs(g - r).sum() / g.size, 1e-5)
    np.testing.assert_allclose(dmd_gradient(generated, real, fake).numpy(), expected, rtol=2e-6)


def test_normaliser_has_a_floor() -> None:
    same = torch.full(SHAPE, 0.7)
    assert torch.equal(dmd_gradient(same, same, same), torch.zeros(SHAPE))
    assert torch.isfinite(dmd_gradient(same, same, same + 1)).all()


def test_derivative_of_dmd_loss_is_the_gradient_over_the_elements() -> None:
    generated, real, fake = _three(1)
    generated.requires_grad_(True)
    gradient = dmd_gradient(generated.detach(), real, fake)
    dmd_loss(generated, gradient).backward()
    expected = gradient.double() / generated.numel()
    assert torch.allclose(generated.grad.double(), expected, rtol=1e-5, atol=1e-9)


def test_critic_loss_falls_to_zero_at_the_true_velocity_and_has_its_slope() -> None:
    v, noise, x0 = (t.double() for t in _three(2))
    assert flow_matching_loss(noise - x0, noise, x0).item() == 0
    v.requires_grad_(True)
    flow_matching_loss(v, noise, x0).backward()
    at, step = (1, 2, 0, 3, 4), 1e-5
    bumped = v.detach().clone()
    bumped[at] += step
    lowered = v.detach().clone()
    lowered[at] -= step
    slope = (flow_matching_loss(bumped, noise, x0) - flow_matching_loss(lowered, noise, x0)) / (
        2 * step
    )
    assert abs(slope.item() - v.grad[at].item()) < 1e-9
