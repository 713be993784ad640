"""The rates against diffusers' schedules, which an optimizer is needed for."""

from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler

from train.optim.lr_schedule import LrScheduler, learning_rate


@pytest.mark.parametrize("scheduler", get_args(LrScheduler))
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
