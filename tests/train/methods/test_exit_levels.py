"""Which levels and steps --score-levels exit, --exits and --critic-warmup give, and which roles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import UserError
from tests.train.methods.test_rollouts import (
    INDICES,
    NEGATIVE,
    OWNED,
    U_BOUNDARY,
    UPDATE,
    Float64,
    drawn,
    recipe_of,
    walk_of,
)
from tests.train.model.test_roles import build_batch, build_roles
from train.data.batches import Batch
from train.functional.rng import spread
from train.methods.distillation import Distillation
from train.methods.dmd import (
    Recipe,
    critic_step,
    draw_level,
    exit_step,
    generator_step,
)
from train.model.roles import CRITIC, GENERATOR

CASES = [("high", "boundary"), ("high", "handover"), ("low", "boundary"), ("full", "boundary")]


def interval_of(expert: str, floor: str, step: int) -> tuple[float, float]:
    """u from the next index of the whole schedule, inside the expert's own levels, written out."""
    following = {0: 0.75, 1: 0.5, 2: 0.25, 3: 0.0}[step]
    low = {"high": U_BOUNDARY if floor == "boundary" else 0.5}.get(expert, 0.0)
    return max(low, following), (U_BOUNDARY if expert == "low" else 0.98)


def levels_of(recipe: Recipe, step: int, *, updates: int, rows: int) -> np.ndarray:  # type: ignore[type-arg]
    batch = build_batch("i2v")
    drawn_u = []
    for update in range(updates):
        for first in range(0, rows, 2):
            part = replace(batch, update=update, samples=(first, first + 1))
            drawn_u.append(draw_level(recipe, part, step=step).u.double().numpy())
    return np.concatenate(drawn_u)


@pytest.mark.parametrize("strata", [1, 4])
@pytest.mark.parametrize(("expert", "floor"), CASES)
def test_levels_of_an_exit_are_uniform_above_the_next_step(
    expert: str, floor: str, strata: int
) -> None:
    """The 0.1% point of Kolmogorov's distance at n samples is 1.95 / √n; strata only narrow it."""
    recipe = recipe_of(expert, score_floor=floor, score_levels="exit", score_strata=strata)
    assert list(recipe.exit_steps) == OWNED[expert]
    for step in OWNED[expert]:
        low, high = interval_of(expert, floor, step)
        u = np.sort(levels_of(recipe, step, updates=150, rows=4))
        assert low <= u[0] and u[-1] <= high + 1e-7
        even = (np.arange(len(u)) + 0.5) / len(u)
        assert np.abs((u - low) / (high - low) - even).max() < 1.95 / np.sqrt(len(u)), step
        if strata == 4:  # each update has one in every quarter
            part = levels_of(recipe, step, updates=1, rows=4)
            assert sorted(((part - low) / (high - low) * 4).astype(int)) == [0, 1, 2, 3]


def test_steps_above_the_low_experts_levels_have_none() -> None:
    """From noise it walks the high expert's steps, too: after 960 comes u = .75, above .643."""
    recipe = recipe_of("low", start="noise", score_levels="exit")
    with pytest.raises(UserError, match=r"--score-levels: exit .* step 960: .*--start latents"):
        recipe.score_interval_of(0)
    assert recipe.score_interval_of(1) == pytest.approx((0.5, U_BOUNDARY))
    assert list(replace(recipe, exits="last").exit_steps) == [3]


@pytest.mark.parametrize("start", ["latents", "noise"])
@pytest.mark.parametrize("expert", ["high", "low", "full"])
def test_the_last_exit_is_the_last_step_of_the_walk(expert: str, start: str) -> None:
    recipe = recipe_of(expert, start=start, exits="last")
    assert list(recipe.walk) == walk_of(expert, start)
    assert {exit_step(recipe, update) for update in range(50)} == {walk_of(expert, start)[-1]}


def _x0_and_noised(
    reference: Float64, recipe: Recipe, batch: Batch, expert: str, floor: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x̂0 of the exit, σ, the noise and x_t at the exit's own levels, in float64."""
    last = exit_step(recipe, batch.update)
    x0 = reference.rollout(batch, [s for s in OWNED[expert] if s <= last], "latents", "renoise")
    low, high = interval_of(expert, floor, last)
    u = low + (high - low) * spread(3, "score level", batch.update, (0, 1), 1).double()
    sigma = (5 * u / (1 + 4 * u)).clamp(min=0.02).view(2, 1, 1, 1, 1)
    eps = drawn(batch, "score noise")
    return x0, sigma, eps, (1 - sigma) * x0 + sigma * eps


@pytest.mark.parametrize("exits", ["all", "last"])
@pytest.mark.parametrize(("expert", "floor"), CASES)
def test_both_losses_at_the_levels_of_the_exit(
    tiny_i2v: Path, expert: str, floor: str, exits: str
) -> None:
    roles, batch = build_roles(tiny_i2v, expert=expert), build_batch("i2v", update=UPDATE)
    recipe = recipe_of(
        expert, score_floor=floor, score_levels="exit", exits=exits,
        real_guidance_scale=3.0, start="latents",
    )  # fmt: skip
    reference = Float64(tiny_i2v, expert, roles)
    x0, sigma, eps, x_t = _x0_and_noised(reference, recipe, batch, expert, floor)
    assert batch.condition is not None
    inputs = torch.cat([x_t, batch.condition.double()], 1)

    v = reference.critic(inputs, sigma, batch.text)
    expected = ((v - (eps - x0)) ** 2).mean().item()
    assert critic_step(roles, recipe, batch).loss.item() == pytest.approx(expected, rel=1e-4)

    fake = x_t - sigma * v
    cond = reference.teacher(inputs, sigma, batch.text)
    other = reference.teacher(inputs, sigma, NEGATIVE.expand(2, -1, -1))
    real = x_t - sigma * (3 * cond - 2 * other)
    g = (fake - real) / (x0 - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    found = generator_step(roles, recipe, batch, NEGATIVE)
    assert found.loss.item() == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-4)
    assert found.u.tolist() == pytest.approx((sigma / (5 - 4 * sigma)).flatten().tolist(), rel=1e-5)


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("head_start", [0, 1, 3, 25])
def test_roles_by_counting(interval: int, head_start: int) -> None:
    """Beside a list of who goes when: the critic's head start, then cycles."""
    objective = Distillation(
        recipe=recipe_of("full"),
        gen_update_interval=interval,
        head_start=head_start,
        uniform_sampling=True,
        learning_rates={GENERATOR: 1e-3, CRITIC: 1e-3},
    )
    order = [CRITIC] * head_start + ([CRITIC] * interval + [GENERATOR]) * 7
    for update, role in enumerate(order):
        assert objective.role_of(update) == role
        for counted in (GENERATOR, CRITIC):
            assert objective.role_updates(counted, update) == order[:update].count(counted)
    assert objective.role_updates(GENERATOR, len(order)) == 7
    assert f"= {len(order)} updates" in objective.describe_length(7)
    assert INDICES[0] == 960.0  # an exit's σ is not that of pure noise
