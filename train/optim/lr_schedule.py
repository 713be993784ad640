"""The learning rate as a function of how many updates a role has made, and of nothing else."""

import math

from train.options import LEAST_POLYNOMIAL_RATE, LrScheduler

DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay")
"""Those that end with the run, so that another length is another course."""


def learning_rate(
    base: float, updates: int, *, scheduler: LrScheduler, warmup: int, length: int
) -> float:
    """Rate for the next update of a role that has made `updates` of `length`, fewer than all.

    It rises to `base` in a straight line over `warmup` updates, the first of which moves, too
    (diffusers' schedules begin at a rate of 0). After that it is diffusers' schedule of that name,
    to the bit; cosines have one cycle, so the one with restarts never comes to its first.
    `warmup_stable_decay` (transformers' name) is constant, then falls in a straight line over the
    second half: min(1, 2·(1 − share done)).
    """
    if updates < warmup:
        return base * (updates + 1) / warmup
    if scheduler not in DECAYING:
        return base
    left, decaying = length - updates, length - warmup
    done = (updates - warmup) / decaying
    if scheduler == "linear":
        return base * (left / decaying)
    if scheduler == "warmup_stable_decay":
        return base * min(1.0, 2 * left / decaying)
    if scheduler == "polynomial":
        rate = (base - LEAST_POLYNOMIAL_RATE) * (1 - done) + LEAST_POLYNOMIAL_RATE
        return base * (rate / base)
    return base * (0.5 * (1.0 + math.cos(math.pi * done)))
