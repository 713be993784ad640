"""--fused-lora: peft's LoRA up to rounding, without its passes over tokens x width."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import UserError
from tests.models import tiny_transformer
from tests.train.conftest import randomise_lora
from tests.train.model.test_roles import NEGATIVE, build_batch, build_recipe, build_roles
from tests.train.test_distill import distill
from train.methods.dmd import generator_step
from train.model.lora_adapter import LoraSpec, fuse
from train.model.roles import CRITIC, GENERATOR, Roles

LORA = LoraSpec(rank=4, alpha=3, targets=("attn1.to_q", "ffn.net.2"))


def _roles(precision: torch.dtype, *, fused: bool) -> Roles:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = tiny_transformer("t2v").bfloat16().to(precision)
    roles = Roles(transformer, LORA, seed=1, fused=fused)
    randomise_lora(roles.parameters(GENERATOR), 1)
    randomise_lora(roles.parameters(CRITIC), 2)
    return roles


def _of_a_layer(roles: Roles, x: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, of A and of B."""
    layer = roles.transformer.blocks[0].attn1.to_q
    x = x.clone().requires_grad_()
    weights = (layer.lora_A[GENERATOR].weight, layer.lora_B[GENERATOR].weight)
    with roles.generator(), roles._autocast(x.device):
        out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, (x, *weights), slope)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_layer_gives_what_peft_gives(precision: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(3)
    x, slope = (torch.randn(2, 30, 32, generator=rng).to(precision) for _ in range(2))
    peft, fused = (_of_a_layer(_roles(precision, fused=fused), x, slope) for fused in (False, True))
    exact = _of_a_layer(_roles(torch.float32, fused=False), x.float(), slope.float())
    if precision == torch.float32:
        for one, other in zip(peft, fused, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        return
    for one, other, true in zip(peft, fused, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        far, near = ((found.float() - true).norm() for found in (one, other))
        assert near <= 1.2 * far and far < 0.01 * true.norm()


@pytest.mark.parametrize("role", [GENERATOR, CRITIC, None])
def test_each_role_keeps_its_own(role: str | None) -> None:
    rng = torch.Generator().manual_seed(4)
    x, text = torch.randn(1, 16, 2, 4, 6, generator=rng), torch.randn(1, 7, 32, generator=rng)
    found = []
    for fused in (False, True):
        roles = _roles(torch.float32, fused=fused)
        with torch.no_grad(), roles.role(role):
            found.append(roles.velocity(x, torch.tensor([500.0]), text, None))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert role is not None or torch.equal(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_an_update(tiny_t2v: Path, checkpointing: bool) -> None:
    found = []
    for fused in (False, True):
        roles = build_roles(tiny_t2v, checkpointing=checkpointing)
        for layer in roles._layers if fused else ():
            fuse(layer)
        loss = generator_step(roles, build_recipe("t2v"), build_batch("t2v"), NEGATIVE).loss
        with roles.generator():
            loss.backward()
        found.append([p.grad for p in roles.parameters(GENERATOR).values()])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


class _Passes(TorchDispatchMode):
    """Sums, products and copies of tensors of one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("add", "add_", "mul", "mul_", "copy_", "clone", "_to_copy"):
            self.found += out.numel() == self.size
        return out


def test_passes_over_tokens_times_width() -> None:
    """Of peft three; the sum of the input's two gradients is a fourth, which stays."""
    x = torch.ones(2, 30, 32, dtype=torch.bfloat16)
    found = []
    for fused in (False, True):
        roles = _roles(torch.bfloat16, fused=fused)
        with _Passes(x.numel()) as passes:
            _of_a_layer(roles, x, torch.ones_like(x))
        found.append(passes.found)
    assert found[0] - found[1] == 3


def test_a_run(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    """Also on a quantised base; a checkpoint remembers it. zero3 can't."""
    more = ("--fused-lora", "--max-train-steps", "1", "--gen-update-interval", "1")
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *more, "--base-precision", "int8")
    assert (out / "checkpoint-1").is_dir()
    with pytest.raises(UserError, match=r"^--fused-lora: found with --strategy zero3"):
        distill(tiny_t2v, t2v_shards, tmp_path / "no", *more, "--strategy", "zero3")
