"""Whole generator and critic steps against a derivation in float64 that shares none of their code.

The reference holds three plain diffusers models (base; base + generator; base + critic), weights
merged by hand, and writes the maths of the brief's section 5 out again.
"""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.models import IMAGE_DIM
from tests.train.model.test_roles import NEGATIVE, build_batch, build_recipe, build_roles
from train.functional.rng import noise, spread
from train.methods.dmd import critic_step, exit_step, generator_step
from train.methods.teacher_gauges import teacher_gauges
from train.model.roles import CRITIC, GENERATOR, Roles

UPDATE = 5


def _merged(plain: torch.nn.Module, roles: Roles, role: str) -> torch.nn.Module:
    """A float64 copy with (alpha / rank)·B·A added to its weights, which then need gradients."""
    model = copy.deepcopy(plain)
    lora = roles.parameters(role)
    for name in lora:
        if ".lora_A." not in name:
            continue
        a, b = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        weight = model.get_parameter(name.replace(".lora_A.weight", ".weight"))
        weight.data += (3 / 4) * b @ a
        weight.requires_grad_(True)
    return model


@pytest.fixture(params=["t2v", "i2v", "wan21-i2v"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def setup(mode: str, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Roles on the low-noise expert (of Wan 2.1 the only one), the same in diffusers, a batch."""
    folder = request.getfixturevalue(f"tiny_{mode.replace('-', '_')}")
    expert, part = ("full", "transformer") if mode == "wan21-i2v" else ("low", "transformer_2")
    plain = WanTransformer3DModel.from_pretrained(folder, subfolder=part)
    batch = build_batch(_maths(mode), update=UPDATE)
    if mode == "wan21-i2v":
        rng = torch.Generator().manual_seed(8)
        batch = replace(batch, image=torch.randn(2, 10, IMAGE_DIM, generator=rng))
    roles = build_roles(folder, expert=expert)
    return roles, plain.double().requires_grad_(False), batch


def _maths(mode: str) -> str:
    """Wan 2.1 i2v has that of i2v, and looks at CLIP's embedding besides."""
    return mode.removeprefix("wan21-")


class _Reference:
    """σ, t and x̂0 of a step of the low expert, in float64."""

    def __init__(self, mode: str, batch):  # type: ignore[no-untyped-def]
        self.shift, self.boundary = (5.0, 0.9) if mode == "i2v" else (12.0, 0.875)
        self.batch = batch
        self.sigmas = [self.shift * u / (1 + (self.shift - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
        self.low = [s for s in self.sigmas if s < self.boundary]

    def x0(self, model, x_t, sigma, text):  # type: ignore[no-untyped-def]
        inputs = (
            x_t
            if self.batch.condition is None
            else torch.cat([x_t, self.batch.condition.double()], 1)
        )
        t = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).expand(2) * 1000
        image = self.batch.image  # CLIP's embedding, as diffusers' pipeline hands it over
        seen = {} if image is None else {"encoder_hidden_states_image": image.double()}
        v = model(inputs, t.float(), text.double(), return_dict=False, **seen)[0]
        return x_t - sigma * v, v

    def guided_x0(self, model, x_t, sigma, scale: float):  # type: ignore[no-untyped-def]
        _, v_cond = self.x0(model, x_t, sigma, self.batch.text)
        _, v_neg = self.x0(model, x_t, sigma, NEGATIVE.expand(2, -1, -1))
        return x_t - sigma * (v_neg + scale * (v_cond - v_neg))

    def drawn(self, purpose: str) -> torch.Tensor:
        return noise(self.batch.latents.shape[1:], 3, purpose, UPDATE, (0, 1)).double()

    def generated(self, student, exit_at: int):  # type: ignore[no-untyped-def]
        """Re-noising from cached latents to the exit, as the low expert does at inference."""
        first = 4 - len(self.low)
        sigma = self.sigmas[first]
        x_t = (1 - sigma) * self.batch.latents.double() + sigma * self.drawn(f"rollout {first}")
        for step in range(first, exit_at + 1):
            x0, _ = self.x0(student, x_t, self.sigmas[step], self.batch.text)
            if step < exit_at:
                sigma = self.sigmas[step + 1]
                x_t = (1 - sigma) * x0.detach() + sigma * self.drawn(f"rollout {step + 1}")
        return x0

    def level(self, purpose: str = "score") -> tuple[torch.Tensor, torch.Tensor]:
        edge = self.boundary / (self.shift - (self.shift - 1) * self.boundary)
        u = (
            np.array([edge, edge])
            * spread(3, f"{purpose} level", UPDATE, (0, 1), 1).double().numpy()
        )
        sigma = np.maximum(self.shift * u / (1 + (self.shift - 1) * u), 0.02)
        return torch.from_numpy(sigma).view(2, 1, 1, 1, 1), self.drawn(f"{purpose} noise")


@pytest.mark.parametrize(
    ("fm_loss_weight", "fake_scale", "batched"),
    [(0.0, 0.0, False), (0.7, 2.5, False), (0.0, 2.5, True)],
)
def test_generator_step(  # type: ignore[no-untyped-def]
    mode: str, setup, fm_loss_weight: float, fake_scale: float, batched: bool
) -> None:
    roles, plain, batch = setup
    recipe = build_recipe(
        _maths(mode),
        fm_loss_weight=fm_loss_weight,
        fake_guidance_scale=fake_scale,
        batched_guidance=batched,
    )
    samples: list[int] = []
    hook = roles.transformer.register_forward_pre_hook(
        lambda _, args, named: samples.append(len(named["hidden_states"])), with_kwargs=True
    )
    watched = generator_step(roles, recipe, batch, NEGATIVE)
    hook.remove()
    guided = 1 + (fake_scale > 0)
    assert samples.count(4) == (guided if batched else 0)
    loss = watched.loss
    with roles.generator():
        loss.backward()

    reference = _Reference(_maths(mode), batch)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    x0 = reference.generated(student, exit_step(recipe, UPDATE))
    sigma, eps = reference.level()
    with torch.no_grad():
        x_t = (1 - sigma) * x0 + sigma * eps
        fake, _ = reference.x0(critic, x_t, sigma, batch.text)
        if fake_scale:
            fake = reference.guided_x0(critic, x_t, sigma, fake_scale)
        real = reference.guided_x0(plain, x_t, sigma, 6.0)
        scale = (x0 - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
        g = (fake - real) / scale
    x0.backward(g / g.numel())
    expected = 0.5 * (g**2).mean()
    if fm_loss_weight:
        real_x0, (sigma, eps) = batch.latents.double(), reference.level("real")
        _, v = reference.x0(student, (1 - sigma) * real_x0 + sigma * eps, sigma, batch.text)
        matching = fm_loss_weight * ((v - (eps - real_x0)) ** 2).mean()
        matching.backward()
        expected = expected + matching

    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, GENERATOR, student)
    numbers = watched.numbers()
    critic, teacher = ((x0 - other).abs().mean().item() for other in (fake, real))
    assert numbers.named() == pytest.approx(
        {
            "balance/critic_error": critic,
            "balance/teacher_error": teacher,
            "balance/critic_over_teacher": critic / teacher,
            **_gauges(x0, reference, exit_step(recipe, UPDATE), given=mode != "t2v"),
        },
        rel=1e-4,
    )
    levels, _ = reference.level()
    assert numbers.sigma == pytest.approx(levels.flatten().tolist(), rel=1e-5)
    assert numbers.loss == loss.item()


def _gauges(x0, reference, step: int, *, given: bool):  # type: ignore[no-untyped-def]
    """Contrast and motion, sample by sample and channel by channel; a given frame is left out."""
    clips = x0.detach().numpy()[:, :, 1:] if given else x0.detach().numpy()
    contrast = np.mean([[channel.std() for channel in clip] for clip in clips])
    motion = np.mean([np.abs(np.diff(clip, axis=1)).mean() for clip in clips])
    at = f"@{1000 * reference.sigmas[step]:.0f}"
    return {f"latent/contrast{at}": contrast, f"latent/motion{at}": motion}


def test_critic_step(mode: str, setup) -> None:  # type: ignore[no-untyped-def]
    roles, plain, batch = setup
    recipe = build_recipe(_maths(mode))
    watched = critic_step(roles, recipe, batch)
    loss = watched.loss
    with roles.critic():
        loss.backward()

    reference = _Reference(_maths(mode), batch)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    with torch.no_grad():
        x0 = reference.generated(student, exit_step(recipe, UPDATE))
    sigma, eps = reference.level()
    _, v = reference.x0(critic, (1 - sigma) * x0 + sigma * eps, sigma, batch.text)
    expected = ((v - (eps - x0)) ** 2).mean()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gauges = _gauges(x0, reference, exit_step(recipe, UPDATE), given=mode != "t2v")
    assert watched.numbers().named() == pytest.approx(gauges, rel=1e-4)
    _compare_lora_gradients(roles, CRITIC, critic)


def test_the_teachers_gauges(mode: str, setup) -> None:  # type: ignore[no-untyped-def]
    """Guided Euler steps; x̂0 without guidance on the way, the finished clip at the last step."""
    roles, plain, batch = setup
    recipe = build_recipe(_maths(mode), real_guidance_scale=2.5)
    found = teacher_gauges(roles, recipe, batch, NEGATIVE)

    reference = _Reference(_maths(mode), batch)
    first = 4 - len(reference.low)
    last = reference.sigmas[-1]
    sigmas = [*reference.low, 0.75 * last, 0.5 * last, 0.25 * last, 0.0]
    x_t = (1 - sigmas[0]) * batch.latents.double()
    x_t = x_t + sigmas[0] * reference.drawn(f"gauge {first}")
    expected = {}
    with torch.no_grad():
        for place, (sigma, following) in enumerate(pairwise(sigmas)):
            if place < len(reference.low) - 1:
                x0, _ = reference.x0(plain, x_t, sigma, batch.text)
                step = first + place
                expected |= _gauges(x0, reference, step, given=mode != "t2v")
            guided = reference.guided_x0(plain, x_t, sigma, 2.5)
            x_t = guided + (following / sigma) * (x_t - guided)
    expected |= _gauges(x_t, reference, 3, given=mode != "t2v")
    assert list(found) == list(expected)
    means = {name: value.mean().item() for name, value in found.items()}
    assert means == pytest.approx(expected, rel=1e-4)


def _compare_lora_gradients(roles: Roles, role: str, merged: torch.nn.Module) -> None:
    """dA = s·Bᵀ·dW and dB = s·dW·Aᵀ, with s = alpha / rank = 3/4."""
    lora = roles.parameters(role)
    for name in (n for n in lora if ".lora_A." in n):
        a, b = lora[name], lora[name.replace("lora_A", "lora_B")]
        slope = merged.get_parameter(name.replace(".lora_A.weight", ".weight")).grad
        for found, expected in (
            (a.grad, 0.75 * b.double().T @ slope),
            (b.grad, 0.75 * slope @ a.double().T),
        ):
            error = (found.double() - expected).norm() / expected.norm()
            assert error < 1e-3, (name, error)
