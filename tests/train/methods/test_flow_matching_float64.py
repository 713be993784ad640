"""A whole step of `wantrain lora` against a derivation in float64 that shares none of its code.

The reference holds one plain diffusers model in float64 with the LoRA merged by hand.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.models.spec import read_model_spec
from tests.models import IMAGE_DIM
from tests.train.conftest import randomise_lora
from tests.train.methods.test_dmd_float64 import _compare_lora_gradients, _maths, _merged
from tests.train.model.test_roles import CPU, TARGETS, build_batch
from tests.train.test_ti2v import Reference, mixed_batch
from train.data.batches import Batch
from train.functional.rng import noise, spread
from train.methods.finetune import LORA
from train.methods.flow_matching import NoiseLevels, flow_matching_step
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import Roles

SEED, UPDATE = 3, 5


def one_role(folder: Path, expert: str, *, checkpointing: bool = False) -> Roles:
    base = load_base(
        read_model_spec(folder),
        expert,  # type: ignore[arg-type]
        precision="no",
        device=CPU,
        gradient_checkpointing=checkpointing,
    )
    lora = LoraSpec(rank=4, alpha=3, targets=select_targets(base, TARGETS))
    roles = Roles(base, lora, seed=7, names=(LORA,))
    randomise_lora(roles.parameters(LORA), 1)
    return roles


def levels_of(expert: str, shift: float, boundary: float | None, sampling: str) -> NoiseLevels:
    return NoiseLevels(
        expert=expert,  # type: ignore[arg-type]
        shift=shift,
        boundary=boundary,
        sampling=sampling,  # type: ignore[arg-type]
        mean=0.4,
        std=1.3,
    )


def reference_sigma(
    expert: str, shift: float, boundary: float, sampling: str, quantiles: np.ndarray
) -> np.ndarray:
    """The q-th quantile of σ on the expert's side, by bisection on the distribution itself."""
    from scipy.stats import norm

    def cumulative(sigma: float) -> float:
        u = sigma / (shift - (shift - 1) * sigma)
        if sampling == "uniform":
            return u
        return float(norm.cdf((np.log(u) - np.log1p(-u) - 0.4) / 1.3))

    low, high = {"low": (1e-12, boundary), "high": (boundary, 1 - 1e-12)}[expert]
    below, above = cumulative(low), cumulative(high)
    found = []
    for q in quantiles:
        a, b = low, high
        for _ in range(60):
            middle = (a + b) / 2
            if cumulative(middle) < below + q * (above - below):
                a = middle
            else:
                b = middle
        found.append(a)
    return np.array(found)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize(
    ("mode", "expert"), [("t2v", "low"), ("t2v", "high"), ("i2v", "low"), ("i2v", "high")]
)
def test_a_step_of_an_expert(
    mode: str, expert: str, sampling: str, tiny_t2v: Path, tiny_i2v: Path
) -> None:
    folder = tiny_i2v if mode == "i2v" else tiny_t2v
    shift, boundary = (5.0, 0.9) if mode == "i2v" else (12.0, 0.875)
    component = {"low": "transformer_2", "high": "transformer"}[expert]
    batch = build_batch(mode, update=UPDATE)
    drawn = spread(SEED, "level", UPDATE, (0, 1), 1).double().numpy()
    sigma = reference_sigma(expert, shift, boundary, sampling, drawn)
    levels = levels_of(expert, shift, boundary, sampling)
    _check(folder, expert, component, levels, batch, sigma)


def test_a_step_of_wan21_i2v(tiny_wan21_i2v: Path) -> None:
    """One transformer, so all levels; CLIP's embedding in the pass."""
    from dataclasses import replace

    rng = torch.Generator().manual_seed(8)
    batch = replace(
        build_batch(_maths("wan21-i2v"), update=UPDATE),
        image=torch.randn(2, 10, IMAGE_DIM, generator=rng),
    )
    u = spread(SEED, "level", UPDATE, (0, 1), 1).double().numpy()
    levels = levels_of("full", 5.0, None, "uniform")
    _check(tiny_wan21_i2v, "full", "transformer", levels, batch, 5 * u / (1 + 4 * u))


def _check(
    folder: Path, expert: str, component: str, levels: NoiseLevels, batch: Batch, sigma: np.ndarray
) -> None:
    roles = one_role(folder, expert)
    loss = flow_matching_step(roles, LORA, levels, batch, strata=1, seed=SEED).loss
    with roles.role(LORA):
        loss.backward()

    plain = WanTransformer3DModel.from_pretrained(folder, subfolder=component)
    merged = _merged(plain.double().requires_grad_(False), roles, LORA)
    x0 = batch.latents.double()
    eps = noise(x0.shape[1:], SEED, "noise", UPDATE, (0, 1)).double()
    s = torch.from_numpy(sigma).view(2, 1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * eps
    inputs = x_t if batch.condition is None else torch.cat([x_t, batch.condition.double()], 1)
    seen = {} if batch.image is None else {"encoder_hidden_states_image": batch.image.double()}
    t = torch.from_numpy(1000 * sigma).float()
    v = merged(inputs, t, batch.text.double(), return_dict=False, **seen)[0]
    expected = ((v - (eps - x0)) ** 2).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, LORA, merged)


def test_a_step_of_ti2v(tiny_ti2v: Path) -> None:
    """One sample keeps its first frame, which has t = 0 and no part in the loss."""
    batch = mixed_batch()
    roles = one_role(tiny_ti2v, "full")
    loss = flow_matching_step(
        roles, LORA, levels_of("full", 5.0, None, "uniform"), batch, strata=1, seed=SEED
    ).loss
    with roles.role(LORA):
        loss.backward()

    plain = WanTransformer3DModel.from_pretrained(tiny_ti2v, subfolder="transformer")
    merged = _merged(plain.double().requires_grad_(False), roles, LORA)
    reference = Reference(batch)
    u = spread(SEED, "level", UPDATE, (0, 1), 1).double()
    sigma = (5 * u / (1 + 4 * u)).view(2, 1, 1, 1, 1)
    x0 = batch.latents.double()
    eps = noise(x0.shape[1:], SEED, "noise", UPDATE, (0, 1)).double()
    _, v = reference.x0(merged, reference.noisy(x0, sigma, "noise"), sigma, batch.text)
    expected = reference.mean((v - (eps - x0)) ** 2).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, LORA, merged)


def test_checkpointing_changes_no_gradient(tiny_ti2v: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        roles = one_role(tiny_ti2v, "full", checkpointing=checkpointing)
        levels = levels_of("full", 5.0, None, "logit-normal")
        loss = flow_matching_step(roles, LORA, levels, mixed_batch(), strata=2, seed=SEED).loss
        with roles.role(LORA):
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in roles.parameters(LORA).items()})  # type: ignore[union-attr]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_levels_of_an_update_are_spread(tiny_t2v: Path) -> None:
    """As the transformer is told them: of two samples one is in either half, now this, now that."""
    roles = one_role(tiny_t2v, "low")
    told: list[torch.Tensor] = []
    roles.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
    )
    levels = levels_of("low", 12.0, 0.875, "logit-normal")
    median = 1000 * levels.sigma(torch.tensor([0.5]))
    halves = {}
    for strata in (1, 2):
        told.clear()
        with torch.no_grad():
            for update in range(30):
                batch = build_batch("t2v", update=update)
                flow_matching_step(roles, LORA, levels, batch, strata=strata, seed=SEED)
        halves[strata] = torch.stack(told) > median
    assert (halves[2].sum(dim=1) == 1).all()
    assert halves[2][:, 0].any() and halves[2][:, 1].any()
    assert (halves[1].sum(dim=1) != 1).any()
