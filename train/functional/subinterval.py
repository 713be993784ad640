"""Scores of a distribution that is known at a noise level σ_s, not at 0: noise on top of noise.

For σ_t ≥ σ_s and α = 1 − σ, x_t = a·x_s + b·ε with a = α_t/α_s, b² = σ_t² − a²·σ_s²: noising a clip
to s and then from s to t is noising it to t. What follows is derived in docs/decisions.md ("Phased
DMD"; Fan et al. 2025, arXiv:2510.27684, section 3.2); with σ_s = 0 it is what clean clips have.

σ_s and σ_t broadcast to latents (B, C, T, H, W); on frames that are kept clean both are 0, and what
comes out is finite and of no account.
"""

import torch

MOST_WEIGHT = 10.0  # of 1/b², in the paper
_LEAST = 1e-6  # b is 0 where σ_t = σ_s, and so is the weight


def coefficients(sigma_s: torch.Tensor, sigma_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of x_t = a·x_s + b·ε."""
    a = (1 - sigma_t) / (1 - sigma_s)
    # b² = (σ_t − a·σ_s)·(σ_t + a·σ_s), whose first factor is this, without cancellation
    way = ((sigma_t - sigma_s) / (1 - sigma_s)).clamp_min(0)
    return a, (way * (sigma_t + a * sigma_s)).sqrt()


def add_noise_to_state(
    x_s: torch.Tensor, noise: torch.Tensor, sigma_s: torch.Tensor, sigma_t: torch.Tensor
) -> torch.Tensor:
    """x_t, drawn from q(x_t | x_s)."""
    a, b = coefficients(sigma_s, sigma_t)
    return a * x_s + b * noise


def state_velocity(
    x_s: torch.Tensor, noise: torch.Tensor, sigma_s: torch.Tensor, sigma_t: torch.Tensor
) -> torch.Tensor:
    """What v(x_t, t) is regressed on; its mean given x_t is the velocity of the marginal.

    Score and velocity are bound by v = −(x_t + σ_t·∇log q(x_t)) / α_t, and the score of
    q(x_t | x_s) is −ε/b: v = (σ_t + α_t·σ_s²/α_s²)/b · ε − x_s/α_s.
    """
    _, b = coefficients(sigma_s, sigma_t)
    of_noise = sigma_t + (1 - sigma_t) * (sigma_s / (1 - sigma_s)).square()
    return of_noise / b.clamp_min(_LEAST) * noise - x_s / (1 - sigma_s)


def state_weight(sigma_s: torch.Tensor, sigma_t: torch.Tensor) -> torch.Tensor:
    """Of the squared error of that velocity: min(1, 10·b²).

    The paper's b²·clamp(1/b², 0, 10). The target's variance grows with 1/b² as t falls to s; a
    weight that only t decides moves no minimiser.
    """
    _, b = coefficients(sigma_s, sigma_t)
    return (MOST_WEIGHT * b.square()).clamp_max(1)


def state_mean(
    x_t: torch.Tensor, x0: torch.Tensor, sigma_s: torch.Tensor, sigma_t: torch.Tensor
) -> torch.Tensor:
    """E[x_s | x_t] of a model that predicts x̂0 from x_t: a·σ_s²/σ_t² · x_t + α_s·b²/σ_t² · x̂0.

    Tweedie's formula for x_t = a·x_s + b·ε, (x_t + b²·∇log q)/a; DDPM's posterior mean.
    """
    a, b = coefficients(sigma_s, sigma_t)
    least = sigma_t.clamp_min(_LEAST)
    return a * (sigma_s / least).square() * x_t + (1 - sigma_s) * (b / least).square() * x0
