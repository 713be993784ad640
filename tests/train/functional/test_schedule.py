"""The schedule against the numbers of the published recipes and against diffusers' schedulers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from train.functional.schedule import (
    MAX_SCORE_U,
    MIN_SCORE_SIGMA,
    Schedule,
    add_noise,
    guide,
    shift_sigma,
    unshift_sigma,
    x0_from_velocity,
)

INDICES = (1000.0, 750.0, 500.0, 250.0)
I2V = Schedule(indices=INDICES, shift=5.0, boundary=0.9)
T2V = Schedule(indices=INDICES, shift=12.0, boundary=0.875)


def test_timesteps_are_those_of_the_brief() -> None:
    assert I2V.timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
    assert T2V.timesteps == pytest.approx((1000, 972.973, 923.077, 800), abs=1e-3)


@pytest.mark.parametrize("schedule", [I2V, T2V], ids=["i2v", "t2v"])
def test_timesteps_agree_with_diffusers(schedule: Schedule) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    scheduler.set_timesteps(sigmas=[index / 1000 for index in INDICES])
    assert scheduler.timesteps.tolist() == pytest.approx(schedule.timesteps, abs=1e-3)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(schedule.sigmas, abs=1e-6)


def test_experts_share_the_steps_as_the_boundary_says() -> None:
    assert (list(I2V.owned_steps("high")), list(I2V.owned_steps("low"))) == ([0, 1], [2, 3])
    assert (list(T2V.owned_steps("high")), list(T2V.owned_steps("low"))) == ([0, 1, 2], [3])
    assert list(T2V.owned_steps("full")) == [0, 1, 2, 3]
    at_shift_5 = Schedule(indices=INDICES, shift=5.0, boundary=0.875)
    assert (list(at_shift_5.owned_steps("high")), list(at_shift_5.owned_steps("low"))) == (
        [0, 1],
        [2, 3],
    )


def test_a_step_on_the_boundary_is_high() -> None:
    schedule = Schedule(indices=(1000.0, 900.0, 500.0), shift=1.0, boundary=0.9)
    assert list(schedule.owned_steps("high")) == [0, 1]


def test_an_expert_without_steps_is_refused_with_the_list() -> None:
    schedule = Schedule(indices=(1000.0, 900.0), shift=12.0, boundary=0.875)
    with pytest.raises(UserError, match=r"low.*1000\.0, 990\.8.*boundary is 875"):
        schedule.owned_steps("low")
    with pytest.raises(UserError, match="one transformer and no boundary"):
        Schedule(indices=INDICES, shift=5.0, boundary=None).owned_steps("high")


def test_score_intervals_meet_at_the_boundary() -> None:
    assert I2V.score_interval("high", "boundary") == pytest.approx((0.642857, MAX_SCORE_U))
    assert I2V.score_interval("low", "boundary") == pytest.approx((0, 0.642857))
    assert T2V.score_interval("high", "boundary")[0] == pytest.approx(0.368421)
    assert T2V.score_interval("full", "boundary") == (0.0, MAX_SCORE_U)


def test_handover_floor_is_the_students_first_low_step() -> None:
    low, _ = I2V.score_interval("high", "handover")
    assert shift_sigma(low, 5.0) == pytest.approx(0.83333, abs=1e-4)
    low, _ = T2V.score_interval("high", "handover")
    assert shift_sigma(low, 12.0) == pytest.approx(0.8)


def test_the_sigma_floor_is_applied_after_the_shift() -> None:
    sigma = T2V.score_sigma(torch.tensor([0.0, 0.001, 0.01, 0.5]))
    assert sigma.tolist() == pytest.approx(
        [MIN_SCORE_SIGMA, MIN_SCORE_SIGMA, 12 * 0.01 / 1.11, 12 * 0.5 / 6.5]
    )


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_unshift_inverts_shift(u: float, shift: float) -> None:
    assert unshift_sigma(float(shift_sigma(u, shift)), shift) == pytest.approx(u, abs=1e-9)


def test_x0_is_recovered_from_the_true_velocity() -> None:
    rng = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 3, 2, 4, 6, generator=rng), torch.randn(2, 3, 2, 4, 6, generator=rng)
    sigma = torch.tensor([0.3, 0.9]).view(2, 1, 1, 1, 1)
    x_t = add_noise(x0, noise, sigma)
    assert torch.allclose(x0_from_velocity(x_t, noise - x0, sigma), x0, atol=1e-6)


def test_guidance_is_the_standard_form() -> None:
    c, u = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(c, u, 6.0).item() == 13.0
    assert guide(c, u, 1.0).item() == 3.0


@pytest.mark.parametrize("indices", [(), (500.0, 750.0), (1001.0, 500.0), (500.0, 0.0), (5.0, 5.0)])
def test_bad_step_lists_are_refused(indices: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="--denoising-step-indices-list"):
        Schedule(indices=indices, shift=5.0, boundary=None)
