"""The learning rate as a function of how many updates a role has made, and of nothing else."""

import torch
from diffusers.optimization import get_scheduler

from train.options import LrScheduler

DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial")
"""Those that end with the run, so that another length is another course."""


def learning_rate(
    base: float, updates: int, *, scheduler: LrScheduler, warmup: int, length: int
) -> float:
    """Rate for the next update of a role that has made `updates` of `length`.

    It rises to `base` in a straight line over `warmup` updates, the first of which moves, too
    (diffusers' schedules begin at a rate of 0). After that it is diffusers' schedule of that name.
    """
    if updates < warmup:
        return base * (updates + 1) / warmup
    # The optimizer is never stepped: a schedule can only be had with one, and polynomial asks it
    # for the first rate.
    shape = get_scheduler(
        "constant_with_warmup" if scheduler == "constant" else scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=base),
        num_warmup_steps=warmup,
        num_training_steps=length,
    )
    return base * float(shape.lr_lambdas[0](updates))
