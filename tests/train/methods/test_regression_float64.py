"""Trajectory regression's loss and gradients against a derivation in float64, in every mode."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.models import IMAGE_DIM
from tests.train.methods.test_dmd_float64 import _compare_lora_gradients, _merged
from tests.train.model.test_roles import NEGATIVE, build_batch, build_roles
from tests.train.test_ti2v import mixed_batch
from train.data.batches import Batch
from train.functional.rng import spread
from train.functional.schedule import Schedule
from train.methods.regression import Regression
from train.model.roles import GENERATOR

INDICES, SHIFT, BOUNDARY = (960.0, 750.0, 500.0, 250.0), 5.0, 0.9
SIGMAS = [5 * u / (1 + 4 * u) for u in (0.96, 0.75, 0.5, 0.25)]  # .9917, .9375, .8333, .625
OWNED = {"high": [0, 1], "low": [2, 3], "full": [0, 1, 2, 3]}


def objective(expert: str, strata: int = 1) -> Regression:
    boundary = None if expert == "full" else BOUNDARY
    return Regression(
        expert=expert,  # type: ignore[arg-type]
        schedule=Schedule(indices=INDICES, shift=SHIFT, boundary=boundary),
        strata=strata,
        uniform_sampling=strata > 1,
        learning_rates={GENERATOR: 1e-3},
        seed=3,
    )


def with_path(batch: Batch, states: range) -> Batch:
    """States at these steps; those of a first frame that is kept are that frame."""
    rng = torch.Generator().manual_seed(17)
    path = torch.randn(2, 4, *batch.latents.shape[1:], generator=rng)
    if batch.noised is not None:
        path = torch.where(batch.noised[:, None] > 0, path, batch.latents[:, None])
    return replace(batch, states=path[:, states.start : states.stop])


def drawn_steps(expert: str, batch: Batch) -> list[int]:
    """Of each sample, written out."""
    share = spread(3, "step", batch.update, batch.samples, 1).double()
    return [OWNED[expert][int(part * len(OWNED[expert]))] for part in share]


CASES = [("i2v", "high"), ("i2v", "low"), ("wan21-i2v", "full"), ("ti2v", "full")]


@pytest.mark.parametrize(("mode", "expert"), CASES)
def test_loss_and_gradients(mode: str, expert: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{mode.replace('-', '_')}")
    roles, method = build_roles(folder, expert=expert), objective(expert)
    part = "transformer_2" if expert == "low" else "transformer"
    plain = WanTransformer3DModel.from_pretrained(folder, subfolder=part)
    plain = plain.double().requires_grad_(False)
    assert list(method.steps) == OWNED[expert]
    seen = set()
    for update in range(3):
        batch = build_batch("i2v", update=update) if mode != "ti2v" else mixed_batch()
        batch = with_path(replace(batch, update=update), method.states)
        if mode == "wan21-i2v":
            rng = torch.Generator().manual_seed(8)
            batch = replace(batch, image=torch.randn(2, 10, IMAGE_DIM, generator=rng))
        for parameter in roles.parameters(GENERATOR).values():
            parameter.grad = None
        found = method.loss(roles, GENERATOR, batch, NEGATIVE)
        with roles.generator():
            found.loss.backward()

        steps = drawn_steps(expert, batch)
        seen |= set(steps)
        sigma = torch.tensor([SIGMAS[k] for k in steps], dtype=torch.float64)
        following = torch.tensor([[*SIGMAS, 0.0][k + 1] for k in steps], dtype=torch.float64)
        assert batch.states is not None
        whole = dict(zip(method.states, batch.states.double().unbind(1), strict=True))
        whole[4] = batch.latents.double()
        x, then = (
            torch.stack([whole[k + ahead][row] for row, k in enumerate(steps)]) for ahead in (0, 1)
        )
        inputs = x if batch.condition is None else torch.cat([x, batch.condition.double()], 1)
        t = 1000 * sigma
        if batch.noised is not None:  # diffusers: a time for each token, 0 in the first frame
            mask = batch.noised[:, 0].expand(2, 3, 4, 6)[:, :, ::2, ::2].flatten(1)
            t = mask * t[:, None]
        image = {} if batch.image is None else {"encoder_hidden_states_image": batch.image.double()}
        student = _merged(plain, roles, GENERATOR)
        v = student(inputs, t.float(), batch.text.double(), return_dict=False, **image)[0]
        error = (v - (x - then) / (sigma - following).view(2, 1, 1, 1, 1)) ** 2
        if batch.noised is not None:  # the mean over what is noised, of each sample
            error = torch.stack([error[0, :, 1:].mean(), error[1].mean()])
        error.mean().backward()
        assert found.loss.item() == pytest.approx(error.mean().item(), rel=1e-4)
        _compare_lora_gradients(roles, GENERATOR, student)
        numbers = found.numbers()
        assert numbers.sigma == pytest.approx(sigma.tolist(), rel=1e-6)
        assert numbers.u == pytest.approx([INDICES[k] / 1000 for k in steps])
    assert len(seen) > 1


def test_a_student_that_is_right_has_no_loss_and_arrives_where_the_path_ends(
    tiny_i2v: Path,
) -> None:
    """Its own Euler walk as the path: the regression is on what `sample` does."""
    for expert, owned in OWNED.items():
        roles, method = build_roles(tiny_i2v, expert=expert), objective(expert)
        batch = build_batch("i2v")
        x = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(4))
        path = {owned[0]: x}
        for k in owned:
            t = torch.full((2,), 1000 * SIGMAS[k], dtype=torch.float64).float()
            with torch.no_grad(), roles.generator():
                v = roles.velocity(path[k], t, batch.text, batch.condition)
            path[k + 1] = path[k] + ([*SIGMAS, 0.0][k + 1] - SIGMAS[k]) * v
        states = torch.stack([path[k] for k in method.states], dim=1)
        batch = replace(batch, latents=path[owned[-1] + 1], states=states)
        assert method.loss(roles, GENERATOR, batch, NEGATIVE).loss < 1e-8
        if expert == "low":
            assert method.samples_from_latents
            arrived = method.sample(roles, batch, NEGATIVE)
            assert torch.allclose(arrived, batch.latents, atol=1e-5)


def test_steps_are_shared_out_over_an_update_however_it_is_cut(tiny_i2v: Path) -> None:
    """--uniform-sampling: of four samples in two micro-steps two take each of two steps."""
    roles, method = build_roles(tiny_i2v, expert="high"), objective("high", strata=4)
    for update in range(6):
        taken: list[float] = []
        for samples in ((0, 1), (2, 3)):
            batch = replace(build_batch("i2v", update=update), samples=samples)
            step = method.loss(roles, GENERATOR, with_path(batch, method.states), NEGATIVE)
            taken += step.numbers().u
        assert sorted(taken) == pytest.approx([0.75, 0.75, 0.96, 0.96])
