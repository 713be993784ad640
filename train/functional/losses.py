"""The losses of distribution matching distillation, and of regressions. Pure; everything in fp32.

Notation of DMD2 (Yin et al. 2024, arXiv:2405.14867) with x0 predictions as scores: at one noise
level, both scores are affine in x̂0 with the same factors, so their difference is that of the x̂0s.
"""

import torch

NORMALISER_FLOOR = 1e-5


def _sample_mean(x: torch.Tensor, noised: torch.Tensor | None) -> torch.Tensor:
    """Mean over everything but the batch where `noised` is 1, shape kept for broadcasting."""
    dims = tuple(range(1, x.ndim))
    if noised is None:
        return x.mean(dim=dims, keepdim=True)
    counted = noised.expand_as(x)
    return (x * counted).sum(dim=dims, keepdim=True) / counted.sum(dim=dims, keepdim=True)


def mean_gap(a: torch.Tensor, b: torch.Tensor, noised: torch.Tensor | None = None) -> torch.Tensor:
    """mean|a − b| over samples and the elements that are noised, scalar."""
    return _sample_mean((a - b).abs(), noised).mean()


def dmd_gradient(
    x0_generated: torch.Tensor,
    x0_real: torch.Tensor,
    x0_fake: torch.Tensor,
    noised: torch.Tensor | None = None,
) -> torch.Tensor:
    """Direction from real to fake, normalised per sample (DMD, eq. 7-8).

    g = (x̂0_fake − x̂0_real) / max(mean|x̂0_generated − x̂0_real|, 1e-5).

    All (B, C, T, H, W) fp32, without gradients; the mean is over elements where `noised`
    (B, 1, T, 1, 1) is 1 (None: all).
    """
    scale = _sample_mean((x0_generated - x0_real).abs(), noised).clamp_min(NORMALISER_FLOOR)
    return (x0_fake - x0_real) / scale


def dmd_loss(
    x0_generated: torch.Tensor, gradient: torch.Tensor, noised: torch.Tensor | None = None
) -> torch.Tensor:
    """Scalar whose derivative by x̂0_generated is `gradient` / number of elements.

    ½·mean (x̂0 − sg(x̂0 − g))²; a mean, not a sum: clipping at 0.05 has to mean something. With
    `noised` it is each sample's mean over those elements, then the mean over samples.
    """
    target = (x0_generated - gradient).detach()
    return 0.5 * _sample_mean((x0_generated - target).square(), noised).mean()


def flow_matching_loss(
    velocity: torch.Tensor,
    noise: torch.Tensor,
    x0: torch.Tensor,
    noised: torch.Tensor | None = None,
) -> torch.Tensor:
    """mean (v̂ − (ε − x0))²: the critic's on generated x̂0, a generator's on cached latents."""
    return regression_loss(velocity, noise - x0, noised)


def regression_loss(
    velocity: torch.Tensor,
    target: torch.Tensor,
    noised: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """mean w·(v̂ − v)² for (B, C, T, H, W); `weight` broadcasts to them (None: 1)."""
    error = (velocity - target).square()
    return _sample_mean(error if weight is None else weight * error, noised).mean()
