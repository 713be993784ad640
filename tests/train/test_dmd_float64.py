"""Whole generator and critic steps against a derivation in float64 that shares none of their code.

The reference holds three plain diffusers models (base; base + generator; base + critic), weights
merged by hand, and writes the maths of the brief's section 5 out again.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.train.test_roles import NEGATIVE, build_batch, build_recipe, build_roles
from train.dmd import critic_step, exit_step, generator_step
from train.rng import noise, uniform
from train.roles import CRITIC, GENERATOR, Roles

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


@pytest.fixture(params=["t2v", "i2v"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _setup(mode: str, tiny_t2v: Path, tiny_i2v: Path):  # type: ignore[no-untyped-def]
    folder = tiny_i2v if mode == "i2v" else tiny_t2v
    plain = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer_2")
    plain = plain.double().requires_grad_(False)
    return build_roles(folder), plain


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
        v = model(inputs, t.float(), text.double(), return_dict=False)[0]
        return x_t - sigma * v, v

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
        u = np.array([edge, edge]) * uniform(3, f"{purpose} level", UPDATE, (0, 1)).double().numpy()
        sigma = np.maximum(self.shift * u / (1 + (self.shift - 1) * u), 0.02)
        return torch.from_numpy(sigma).view(2, 1, 1, 1, 1), self.drawn(f"{purpose} noise")


@pytest.mark.parametrize("fm_loss_weight", [0.0, 0.7])
def test_generator_step(mode: str, tiny_t2v: Path, tiny_i2v: Path, fm_loss_weight: float) -> None:
    roles, plain = _setup(mode, tiny_t2v, tiny_i2v)
    batch = build_batch(mode, update=UPDATE)
    recipe = build_recipe(mode, fm_loss_weight=fm_loss_weight)
    loss = generator_step(roles, recipe, batch, NEGATIVE)
    with roles.generator():
        loss.backward()

    reference = _Reference(mode, batch)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    x0 = reference.generated(student, exit_step(recipe, UPDATE))
    sigma, eps = reference.level()
    with torch.no_grad():
        x_t = (1 - sigma) * x0 + sigma * eps
        fake, _ = reference.x0(critic, x_t, sigma, batch.text)
        _, v_cond = reference.x0(plain, x_t, sigma, batch.text)
        _, v_neg = reference.x0(plain, x_t, sigma, NEGATIVE.expand(2, -1, -1))
        real = x_t - sigma * (v_neg + 6.0 * (v_cond - v_neg))
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


def test_critic_step(mode: str, tiny_t2v: Path, tiny_i2v: Path) -> None:
    roles, plain = _setup(mode, tiny_t2v, tiny_i2v)
    batch, recipe = build_batch(mode, update=UPDATE), build_recipe(mode)
    loss = critic_step(roles, recipe, batch)
    with roles.critic():
        loss.backward()

    reference = _Reference(mode, batch)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    with torch.no_grad():
        x0 = reference.generated(student, exit_step(recipe, UPDATE))
    sigma, eps = reference.level()
    _, v = reference.x0(critic, (1 - sigma) * x0 + sigma * eps, sigma, batch.text)
    expected = ((v - (eps - x0)) ** 2).mean()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, CRITIC, critic)


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
