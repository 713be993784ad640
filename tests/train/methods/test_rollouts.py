"""Rollouts, score levels and guidance of every kind against float64 and plain diffusers models.

`test_dmd_float64.py` checks whole steps of one recipe; here is what other recipes change.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.train.methods.test_dmd_float64 import _merged
from tests.train.model.test_roles import NEGATIVE, build_batch, build_recipe, build_roles
from train.data.batches import Batch
from train.functional.losses import dmd_gradient
from train.functional.rng import noise, spread
from train.functional.schedule import Schedule
from train.methods.dmd import Recipe, critic_step, draw_level, exit_step, generator_step, rollout
from train.model.roles import CRITIC, GENERATOR, Roles

UPDATE = 5
# Not from 1000 on: at σ = 1 a rollout from latents and one from noise would start alike.
INDICES, SHIFT, BOUNDARY = (960.0, 750.0, 500.0, 250.0), 5.0, 0.9
SIGMAS = [5 * u / (1 + 4 * u) for u in (0.96, 0.75, 0.5, 0.25)]  # .9917, .9375, .8333, .625
U_BOUNDARY = 0.9 / (5 - 4 * 0.9)
EXPERTS = ("high", "low", "full")
OWNED = {"high": [0, 1], "low": [2, 3], "full": [0, 1, 2, 3]}
VelocityOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def recipe_of(expert: str, **changes: object) -> Recipe:
    schedule = Schedule(indices=INDICES, shift=SHIFT, boundary=BOUNDARY)
    return build_recipe("i2v", expert=expert, schedule=schedule, **changes)


def walk_of(expert: str, start: str) -> list[int]:
    """Positions of the steps, written out: from noise every walk begins at the first one."""
    return list(range(OWNED[expert][-1] + 1)) if start == "noise" else OWNED[expert]


class Float64:
    """Base, base + generator, base + critic as plain diffusers models in float64."""

    def __init__(self, folder: Path, expert: str, roles: Roles) -> None:
        component = "transformer_2" if expert == "low" else "transformer"
        plain = WanTransformer3DModel.from_pretrained(folder, subfolder=component)
        plain = plain.double().requires_grad_(False)
        self.teacher = self._velocity(plain)
        self.student = self._velocity(_merged(plain, roles, GENERATOR))
        self.critic = self._velocity(_merged(plain, roles, CRITIC))

    def _velocity(self, model: torch.nn.Module) -> VelocityOf:
        @torch.no_grad()
        def velocity(x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            t = (1000 * sigma.reshape(-1)).expand(2)
            out: torch.Tensor = model(x, t.float(), text.double(), return_dict=False)[0]
            return out

        return velocity

    def rollout(self, batch: Batch, steps: list[int], start: str, pairing: str) -> torch.Tensor:
        """x̂0 at the last of `steps`."""
        text, condition = batch.text, batch.condition
        assert condition is not None
        x = drawn(batch, f"rollout {steps[0]}")
        if start == "latents":
            first = SIGMAS[steps[0]]
            x = (1 - first) * batch.latents.double() + first * x
        for number, step in enumerate(steps):
            sigma = torch.tensor(SIGMAS[step], dtype=torch.float64)
            v = self.student(torch.cat([x, condition.double()], 1), sigma, text)
            x0 = x - sigma * v
            if number + 1 == len(steps):
                return x0
            then = SIGMAS[steps[number + 1]]
            if pairing == "euler":  # down the straight line: dx = v·dσ with dσ < 0
                x = x - (sigma - then) * v
            else:
                x = (1 - then) * x0 + then * drawn(batch, f"rollout {steps[number + 1]}")
        raise AssertionError("no step")


def drawn(batch: Batch, purpose: str) -> torch.Tensor:
    return noise(batch.latents.shape[1:], 3, purpose, batch.update, batch.samples).double()


@pytest.mark.parametrize("pairing", ["renoise", "euler"])
@pytest.mark.parametrize("start", ["latents", "noise"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_rollout_to_every_step(tiny_i2v: Path, expert: str, start: str, pairing: str) -> None:
    roles = build_roles(tiny_i2v, expert=expert)
    recipe, batch = recipe_of(expert, start=start, pairing=pairing), build_batch("i2v")
    reference, walk = Float64(tiny_i2v, expert, roles), walk_of(expert, start)
    assert list(recipe.walk) == walk
    for number, last in enumerate(walk):
        found = rollout(roles, recipe, batch, last=last, with_gradient=False)
        expected = reference.rollout(batch, walk[: number + 1], start, pairing)
        assert (found.double() - expected).norm() / expected.norm() < 1e-5, last


def score_interval(expert: str, floor: str) -> tuple[float, float]:
    """(low, high) of u by the brief: the hand-over of this schedule is at index 500."""
    if expert == "high":
        return (0.5 if floor == "handover" else U_BOUNDARY), 0.98
    return 0.0, (U_BOUNDARY if expert == "low" else 0.98)


@pytest.mark.parametrize("expert", EXPERTS)
def test_the_seeds_maths_walks_all_steps_and_bounds_levels_by_the_expert_alone(
    tiny_i2v: Path, expert: str
) -> None:
    """VideoX-Fun: `denoising_step_list` whole for either expert; indices of the expert's part."""
    roles = build_roles(tiny_i2v, expert=expert)
    recipe, batch = recipe_of(expert, start="noise", maths="seed"), build_batch("i2v")
    assert {exit_step(recipe, update) for update in range(100)} == {0, 1, 2, 3}
    found = rollout(roles, recipe, batch, last=3, with_gradient=False).double()
    reference = Float64(tiny_i2v, expert, roles)
    expected = reference.rollout(batch, [0, 1, 2, 3], "noise", "renoise")
    assert (found - expected).norm() / expected.norm() < 1e-5

    low = U_BOUNDARY if expert == "high" else 0.0
    high = U_BOUNDARY if expert == "low" else 1.0
    levels = [draw_level(recipe, build_batch("i2v", update=update)) for update in range(400)]
    u = torch.cat([level.u for level in levels]).double().numpy()
    assert low <= u.min() < low + 0.01 and high - 0.01 < u.max() <= high
    sigma = torch.cat([level.sigma.flatten() for level in levels]).double().numpy()
    np.testing.assert_allclose(sigma, 5 * u / (1 + 4 * u), rtol=1e-5)  # no floor


LEVELS = [("high", "boundary"), ("high", "handover"), ("low", "boundary"), ("full", "boundary")]


@pytest.mark.parametrize(("expert", "floor"), LEVELS)
def test_score_levels_fill_the_interval_and_stay_inside(expert: str, floor: str) -> None:
    low, high = score_interval(expert, floor)
    recipe = recipe_of(expert, score_floor=floor)
    levels = [draw_level(recipe, build_batch("i2v", update=update)) for update in range(400)]
    u = torch.cat([level.u for level in levels]).double().numpy()
    assert low <= u.min() < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < u.max() <= high
    assert abs(u.mean() - (low + high) / 2) < 0.05 * (high - low)
    assert abs(np.corrcoef(u[0::2], u[1::2])[0, 1]) < 0.2  # each sample has its own level
    sigma = torch.cat([level.sigma.flatten() for level in levels]).double().numpy()
    np.testing.assert_allclose(sigma, np.maximum(5 * u / (1 + 4 * u), 0.02), rtol=1e-5)
    t = torch.cat([level.timestep for level in levels]).double().numpy()
    np.testing.assert_allclose(t, 1000 * sigma, rtol=1e-6)


@pytest.mark.parametrize(("expert", "floor"), LEVELS)
@pytest.mark.parametrize(
    ("real_scale", "fake_scale"), [(6.0, 0.0), (3.0, 2.5), (1.0, 1.0), (0.0, 4.0)]
)
def test_generator_loss_with_every_guidance_and_floor(
    tiny_i2v: Path, expert: str, floor: str, real_scale: float, fake_scale: float
) -> None:
    """Both scales are used, each by its own role; 0 and 1 are the conditional prediction."""
    roles, batch = build_roles(tiny_i2v, expert=expert), build_batch("i2v", update=UPDATE)
    recipe = recipe_of(
        expert,
        score_floor=floor,
        real_guidance_scale=real_scale,
        fake_guidance_scale=fake_scale,
        start="noise",
        pairing="euler",
    )
    loss = generator_step(roles, recipe, batch, NEGATIVE).loss.item()

    reference = Float64(tiny_i2v, expert, roles)
    last = exit_step(recipe, UPDATE)
    x0 = reference.rollout(batch, list(range(last + 1)), "noise", "euler")
    low, high = score_interval(expert, floor)
    u = low + (high - low) * spread(3, "score level", UPDATE, (0, 1), 1).double()
    sigma = (5 * u / (1 + 4 * u)).clamp(min=0.02).view(2, 1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * drawn(batch, "score noise")

    def x0_of(velocity: VelocityOf, scale: float) -> torch.Tensor:
        assert batch.condition is not None
        inputs = torch.cat([x_t, batch.condition.double()], 1)
        v = velocity(inputs, sigma, batch.text)
        if scale > 1:
            other = velocity(inputs, sigma, NEGATIVE.expand(2, -1, -1))
            v = scale * v + (1 - scale) * other
        return x_t - sigma * v

    real, fake = x0_of(reference.teacher, real_scale), x0_of(reference.critic, fake_scale)
    g = (fake - real) / (x0 - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    assert loss == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-4)


@pytest.mark.parametrize("start", ["latents", "noise"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_exit_steps_are_uniform_over_the_walk(expert: str, start: str) -> None:
    """χ² over 2,000 updates (its 0.1% point at 3 degrees of freedom is 16.3), no memory."""
    recipe, walk = recipe_of(expert, start=start), walk_of(expert, start)
    exits = [exit_step(recipe, update) for update in range(2000)]
    assert set(exits) == set(walk)
    expected = 2000 / len(walk)
    assert sum((exits.count(step) - expected) ** 2 / expected for step in walk) < 16.3
    repeats = sum(a == b for a, b in itertools.pairwise(exits)) / 2000
    assert abs(repeats - 1 / len(walk)) < 0.05


@pytest.mark.parametrize("role", [GENERATOR, CRITIC])
def test_a_batch_is_the_mean_of_its_samples(tiny_i2v: Path, role: str) -> None:
    """Exit step common to all, noise and level each sample's own: how a batch is cut is free."""
    roles, recipe = build_roles(tiny_i2v), recipe_of("low", start="noise")
    exits = set()
    for update in range(4):
        whole = build_batch("i2v", update=update)
        assert whole.condition is not None
        parts = [
            Batch(
                update=update,
                samples=whole.samples[row : row + 1],
                keys=whole.keys[row : row + 1],
                latents=whole.latents[row : row + 1],
                text=whole.text[row : row + 1],
                condition=whole.condition[row : row + 1],
            )
            for row in (0, 1)
        ]

        def loss(batch: Batch) -> float:
            if role == CRITIC:
                return critic_step(roles, recipe, batch).loss.item()
            return generator_step(roles, recipe, batch, NEGATIVE).loss.item()

        assert loss(whole) == pytest.approx(sum(map(loss, parts)) / 2, rel=1e-5)
        exits.add(exit_step(recipe, update))
    assert len(exits) > 1


def _with_distance(distance: float) -> Sequence[float]:
    same = torch.full((1, 1, 1, 2, 2), 0.5, dtype=torch.float64)
    return dmd_gradient(same + distance, same, same + 1).flatten().tolist()


def test_constants_are_the_briefs() -> None:
    """Literal numbers on purpose: an import of the constant would follow it wherever it goes."""
    assert _with_distance(0.0) == pytest.approx([1e5] * 4)
    assert _with_distance(2e-5) == pytest.approx([5e4] * 4)
    schedule = Schedule(indices=INDICES, shift=1.0, boundary=BOUNDARY)
    assert schedule.score_interval("full", "boundary") == (0.0, 0.98)
    assert schedule.score_interval("high", "boundary")[1] == 0.98
    edge = Schedule(indices=(1000.0, 500.0), shift=1.0, boundary=0.999)
    assert edge.score_interval("low", "boundary") == (0.0, 0.98)
    levels = schedule.score_sigma(torch.tensor([0.0, 0.019, 0.021]))
    assert levels.tolist() == pytest.approx([0.02, 0.02, 0.021])


@pytest.mark.parametrize(("expert", "floor"), LEVELS)
def test_levels_of_an_update_are_spread_over_the_interval_however_it_is_cut(
    expert: str, floor: str
) -> None:
    """--uniform-sampling: four samples in two micro-steps; a quarter of the interval each."""
    low, high = score_interval(expert, floor)
    recipe = recipe_of(expert, score_floor=floor, score_strata=4)
    for update in range(50):
        halves = [
            replace(build_batch("i2v", update=update), samples=samples)
            for samples in ((0, 1), (2, 3))
        ]
        u = torch.cat([draw_level(recipe, half).u for half in halves]).double().numpy()
        assert sorted(((u - low) / (high - low) * 4).astype(int)) == [0, 1, 2, 3]
        apart = [draw_level(recipe_of(expert, score_floor=floor), half).u for half in halves]
        assert not np.allclose(u, torch.cat(apart).double().numpy())
