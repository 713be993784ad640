"""`--use-8bit-adam`: codes that survive a checkpoint, steps near fp32's, and runs that go on."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from shared.errors import UserError
from tests.train.test_distill import arguments, distill, final_bytes
from train.cli.app import app as wantrain
from train.optim.adamw8bit import LEAST, AdamW8bit, coded, decoded, moment_bytes

SETTINGS = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 0.0}
WIDE = ("--rank", "128", "--gen-update-interval", "1", "--mixed-precision", "no")
"""Matrices of 128 × 32 weights, the least that are kept in 8 bits."""


def gradients(step: int, spread: float) -> torch.Tensor:
    """(64, 517), of sizes that lie e^±spread apart (3: six decades in a block); some are zero."""
    sizes = torch.exp(spread * torch.randn(64, 517, generator=torch.Generator().manual_seed(1)))
    rng = torch.Generator().manual_seed(100 + step)
    drawn = torch.randn(64, 517, generator=rng) + 0.5
    return 1e-7 * sizes * drawn * (torch.rand(64, 517, generator=rng) > 0.1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_decoded_values_give_the_same_codes_again(spread: float, signed: bool) -> None:
    values = gradients(0, spread) if signed else gradients(0, spread).abs()
    chance = torch.Generator().manual_seed(5)
    once = decoded(*coded(values, signed=signed, chance=chance), values.shape, signed=signed)
    again = decoded(*coded(once, signed=signed), values.shape, signed=signed)
    assert torch.equal(again, once)
    assert torch.equal(once.square().sqrt(), once.abs())  # as a checkpoint holds the second moment
    assert float((once - values).norm() / values.norm()) < 0.03
    if not signed:
        assert torch.equal(once == 0, values == 0)
    assert bool((once * values >= 0).all())


def largest_steps(optimizer: type[torch.optim.AdamW], spread: float) -> tuple[float, torch.Tensor]:
    weight = nn.Parameter(torch.zeros(64, 517))
    adam, largest = optimizer([weight], **SETTINGS), 0.0
    for step in range(60):
        before = weight.detach().clone()
        # The gradient goes away in the end: what was rounded to nothing would divide by it.
        weight.grad = gradients(step, spread) * (1.0 if step < 50 else 1e-6)
        adam.step()
        largest = max(largest, float((weight.detach() - before).abs().max()))
    return largest, weight.detach()


@pytest.mark.parametrize(("spread", "far"), [(0.5, 0.1), (3.0, 0.5)])
def test_steps_stay_near_those_of_fp32(spread: float, far: float) -> None:
    whole, expected = largest_steps(torch.optim.AdamW, spread)
    largest, found = largest_steps(AdamW8bit, spread)
    assert largest < 3 * whole  # m rounded up to twice, the root down to two thirds
    assert float((found - expected).norm() / expected.norm()) < far


def test_a_moment_that_changes_by_a_thousandth_does_not_stand_still() -> None:
    slope = torch.linspace(0.5, 1, 64 * 64).view(64, 64)
    steps = []
    for optimizer in (torch.optim.AdamW, AdamW8bit):
        weight = nn.Parameter(torch.zeros(64, 64))
        adam = optimizer([weight], **SETTINGS)
        for _ in range(400):
            weight.grad = slope.clone()
            adam.step()
        steps.append(weight.detach())
    assert float((steps[1] - steps[0]).norm() / steps[0].norm()) < 0.02


def test_small_matrices_are_those_of_torch_and_large_ones_take_a_quarter() -> None:
    small, same = (nn.Parameter(torch.zeros(LEAST - 1)) for _ in range(2))
    large = nn.Parameter(torch.zeros(100, 100))
    ours, theirs = AdamW8bit([small, large], **SETTINGS), torch.optim.AdamW([same], **SETTINGS)
    for step in range(3):
        small.grad = gradients(step, 1.0).flatten()[: LEAST - 1].clone()
        same.grad, large.grad = small.grad.clone(), torch.ones(100, 100)
        ours.step()
        theirs.step()
    assert torch.equal(small, same)
    for parameter in (small, large):
        held = sum(v.nbytes for name, v in ours.state[parameter].items() if name != "step")
        assert held == moment_bytes(parameter.numel())
    assert moment_bytes(10_000) < 0.26 * 8 * 10_000


def test_a_run_goes_on_to_the_bit_and_without_it_too(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    eight = (*WIDE, "--use-8bit-adam")
    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", *eight, "--max-train-steps", "3")
    out = tmp_path / "out"
    on = ("--resume-from-checkpoint", "latest")
    distill(tiny_t2v, t2v_shards, out, *eight, "--max-train-steps", "2")
    moments = load_file(out / "checkpoint-2" / "generator_optimizer.safetensors")
    assert {value.dtype for value in moments.values()} == {torch.float32}
    distill(tiny_t2v, t2v_shards, out, *eight, "--max-train-steps", "3", *on)
    assert final_bytes(out) == final_bytes(whole)
    for more in ((), ("--use-8bit-adam",)):  # fp32 from 8 bits, and back
        steps = "5" if more else "4"
        distill(tiny_t2v, t2v_shards, out, *WIDE, *more, "--max-train-steps", steps, *on)
    fp32 = distill(tiny_t2v, t2v_shards, tmp_path / "fp32", *WIDE, "--max-train-steps", "3")
    one, other = (
        load_file(run / "checkpoint-3" / "generator_weights.safetensors") for run in (fp32, whole)
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for run, optimizer in ((whole, "AdamW8bit"), (fp32, "torch.optim.AdamW")):
        with safe_open(run / "lora-low-kohya.safetensors", "pt") as file:
            assert file.metadata()["ss_optimizer"] == optimizer


def test_strategies_that_cut_moments_refuse_it(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    given = arguments(
        tiny_t2v, t2v_shards, tmp_path, "--use-8bit-adam", "--strategy", "zero2",
        "--num-processes", "2",
    )  # fmt: skip
    with pytest.raises(UserError, match="--use-8bit-adam: found with --strategy zero2"):
        wantrain(given, standalone_mode=False)
