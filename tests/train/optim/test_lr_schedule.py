"""The rates against diffusers' and transformers' schedules, which need an optimizer."""

from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from transformers import get_wsd_schedule

from train.optim.lr_schedule import LrScheduler, learning_rate


@pytest.mark.parametrize("scheduler", sorted({*get_args(LrScheduler)} - {"warmup_stable_decay"}))
@pytest.mark.parametrize(("warmup", "length"), [(0, 1), (0, 37), (5, 37), (36, 37), (100, 1000)])
@pytest.mark.parametrize("base", [2e-3, 1e-5, 3.7e-6])
def test_rates_are_those_of_diffusers(
    scheduler: LrScheduler, warmup: int, length: int, base: float
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=length
    ).lr_lambdas[0]
    for updates in range(length):
        found = learning_rate(base, updates, scheduler=scheduler, warmup=warmup, length=length)
        late = base * float(theirs(updates))
        assert found == (late if updates >= warmup else base * (updates + 1) / warmup)


@pytest.mark.parametrize(("warmup", "length"), [(0, 2), (0, 38), (5, 37), (36, 38), (100, 1000)])
@pytest.mark.parametrize("base", [2e-3, 3.7e-6])
def test_the_second_half_falls_to_nothing(warmup: int, length: int, base: float) -> None:
    """transformers' schedule of that name with half of what follows the warm-up as its decay, and
    the recipe's min(1, 2·(1 − (i − 1)/N)) for the i-th of N updates."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    half = (length - warmup) // 2
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=warmup, num_decay_steps=half, num_training_steps=length,
        decay_type="linear", min_lr_ratio=0.0,
    ).lr_lambdas[0]  # fmt: skip
    scheduler: LrScheduler = "warmup_stable_decay"
    for updates in range(length):
        found = learning_rate(base, updates, scheduler=scheduler, warmup=warmup, length=length)
        if updates >= warmup:
            assert found == pytest.approx(base * float(theirs(updates)), rel=1e-12)
        if not warmup:
            i = updates + 1
            assert found == pytest.approx(base * min(1.0, 2 * (1 - (i - 1) / length)), rel=1e-12)
    assert found > 0
    odd = learning_rate(base, 2, scheduler=scheduler, warmup=0, length=3)
    assert odd == pytest.approx(base * 2 / 3)
