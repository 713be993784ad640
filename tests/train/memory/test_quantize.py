"""`--base-precision`: what codes stand for, what autograd keeps, and runs that train on them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shared.errors import UserError
from shared.models.spec import read_model_spec
from shared.models.toy_model import toy_folder
from tests.train.methods.test_finetune import finetune
from tests.train.strategies.test_strategies import (
    IN_TWO,
    RUN,
    SINGLE,
    apart,
    command,
    lora_of,
    typed,
)
from tests.train.test_distill import arguments, distill, final_bytes, losses
from train.cli.app import app as wantrain
from train.memory.estimate import base_sizes
from train.memory.quantize import QuantisedLinear, quantise, quantised_bytes
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import GENERATOR, Roles
from train.options import BasePrecision, Precision
from train.saving.provenance import read_provenance

CPU = torch.device("cpu")
QUANTISED = ("int8", "fp8", "nf4")
# The values of NormalFloat4, from the appendix of QLoRA (arXiv:2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def layer(precision: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantisedLinear]:
    """A linear layer whose rows are of very different size, one of zeros; and its quantised form.

    96 columns: a block of nf4's 64 weights goes over the end of a row.
    """
    torch.manual_seed(4)
    linear = nn.Linear(96, 40).requires_grad_(False)
    linear.weight *= torch.logspace(-4, 1, 40)[:, None]
    linear.weight[3] = 0
    linear = linear.to(dtype)
    return linear, QuantisedLinear(linear, precision, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", QUANTISED)
def test_each_weight_is_the_nearest_that_its_scale_allows(precision: str) -> None:
    linear, quantised = layer(precision)
    weight, found = linear.weight.double(), quantised.weight().double()
    if precision == "nf4":
        blocks, grid = weight.reshape(-1, 64), torch.tensor(NF4).double()
        largest = blocks.abs().amax(dim=1, keepdim=True)
    else:
        blocks, largest = weight, weight.abs().amax(dim=1, keepdim=True)
        codes = torch.arange(256, dtype=torch.uint8)
        grid = codes.view(torch.int8 if precision == "int8" else torch.float8_e4m3fn).double()
        grid = grid[grid.isfinite()] / (127 if precision == "int8" else 448)
    allowed = largest * grid[grid.abs() <= 1]
    off = (blocks[..., None] - allowed[:, None]).abs().amin(dim=-1)
    assert torch.allclose(
        (blocks - found.reshape(blocks.shape)).abs(),
        off,
        rtol=1e-3,
        atol=1e-6 * float(allowed.max()),
    )
    assert torch.equal(found[3], torch.zeros(96).double())


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_its_weight(precision: str, dtype: torch.dtype) -> None:
    _, quantised = layer(precision, dtype)
    x = torch.randn(2, 7, 96).to(dtype).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = quantised(x)
    slope = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, slope)
    weight, bias = quantised.weight().double(), quantised.bias.double()
    assert y.dtype == found.dtype == dtype
    close = (
        {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    )
    assert torch.allclose(y.double(), x.double() @ weight.T + bias, **close)
    expected = slope.double() @ weight
    assert float((found - expected).norm() / expected.norm()) < close["rtol"]


@pytest.mark.long
@pytest.mark.parametrize("precision", QUANTISED)
def test_compiled_code_believes_what_it_is_told_of_shapes(precision: str) -> None:
    """By torch's own compiler: tracing alone takes a library's word for its shapes."""
    _, quantised = layer(precision)
    found = []
    for forward in (quantised, torch.compile(quantised)):
        x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = forward(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    for eager, compiled in zip(*found, strict=True):
        assert eager is not None and torch.allclose(eager, compiled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", QUANTISED)
def test_autograd_keeps_codes_and_no_weight(precision: str) -> None:
    _, quantised = layer(precision, torch.bfloat16)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantised(torch.randn(2, 7, 96, dtype=torch.bfloat16, requires_grad=True))
    own = {parameter.data_ptr() for parameter in quantised.parameters()}
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= own


def toy_roles(precision: Precision, stored: BasePrecision | None) -> Roles:
    base = load_base(
        read_model_spec(toy_folder("toy")), "full", precision=precision, device=CPU,
        gradient_checkpointing=False,
    )  # fmt: skip
    spec = LoraSpec(rank=4, alpha=3, targets=select_targets(base, ("q", "ffn.0")))
    roles = Roles(base, spec, seed=1)
    quantise(base, stored, CPU)
    return roles


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_toys_velocity_is_near_that_of_the_whole_base(precision: Precision) -> None:
    """benchmarks/quantised_base.py has it for real inputs; noise as latents and text is harder."""
    rng = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(3, 16, 3, 8, 6, generator=rng), torch.randn(3, 512, 64, generator=rng)
    velocities = {}
    for stored in (None, *QUANTISED):
        roles = toy_roles(precision, stored)  # type: ignore[arg-type]
        with roles.teacher(), torch.no_grad():
            velocities[stored] = roles.velocity(x_t, torch.tensor([950.0, 500, 100]), text, None)
    whole = velocities.pop(None)
    far = {name: float((v - whole).norm() / whole.norm()) for name, v in velocities.items()}
    assert 0 < far["int8"] < 0.03 < far["fp8"] < 0.09 < far["nf4"] < 0.3


@pytest.mark.parametrize("stored", QUANTISED)
def test_only_linear_layers_of_blocks_and_never_loras(stored: BasePrecision) -> None:
    base = toy_roles("bf16", stored).transformer
    quantised = {n for n, module in base.named_modules() if isinstance(module, QuantisedLinear)}
    assert len(quantised) == 4 * 10  # blocks × q, k, v, o of two attentions, two of the FFN
    assert all(name.startswith("blocks.") and ".lora_" not in name for name in quantised)
    frozen = [p for p in base.parameters() if not p.requires_grad]
    plain = load_base(
        read_model_spec(toy_folder("toy")), "full", precision="bf16", device=CPU,
        gradient_checkpointing=False,
    )  # fmt: skip
    assert sum(p.nbytes for p in frozen) == sum(base_sizes(plain, "bf16", stored).values())


def test_bytes_of_a_weight() -> None:
    for precision in QUANTISED:
        _, quantised = layer(precision)
        held = quantised.codes.nbytes + quantised.scales.nbytes
        assert held == quantised_bytes(40, 96, precision)  # type: ignore[arg-type]
    assert quantised_bytes(5120, 5120, "int8") == 5120 * 5120 + 5120 * 4


def test_loras_of_earlier_blocks_get_gradients_through_checkpointed_blocks() -> None:
    slopes = []
    for checkpointing in (False, True):
        roles = toy_roles("no", "int8")
        if checkpointing:
            roles.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        for parameter in roles.parameters(GENERATOR).values():
            parameter.data.fill_(0.01)
        with roles.generator():
            x_t = torch.ones(1, 16, 1, 8, 6)
            roles.velocity(
                x_t, torch.tensor([500.0]), torch.ones(1, 512, 64), None
            ).sum().backward()
        slopes.append([p.grad for p in roles.parameters(GENERATOR).values()])
    for one, other in zip(*slopes, strict=True):
        assert one is not None and other is not None
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("stored", QUANTISED)
def test_a_run_trains_both_roles_and_goes_on_where_it_was(
    stored: str, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    chosen = ("--base-precision", stored, "--gen-update-interval", "1")
    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", *chosen, "--max-train-steps", "2")
    out = tmp_path / "out"
    distill(tiny_t2v, t2v_shards, out, *chosen, "--max-train-steps", "1")
    distill(
        tiny_t2v, t2v_shards, out, *chosen, "--max-train-steps", "2",
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert final_bytes(out) == final_bytes(whole)
    assert all(value > 0 for curve in losses(out).values() for _, value in curve)
    told = read_provenance(out / "lora-low-diffusers.safetensors")
    assert told.recipe["base_precision"] == stored
    bf16 = distill(tiny_t2v, t2v_shards, tmp_path / "bf16", *chosen[2:], "--max-train-steps", "2")
    file = "checkpoint-2/generator_weights.safetensors"  # LoRA files differ in their metadata, too
    one, other = load_file(bf16 / file), load_file(whole / file)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stored", ["int8", "nf4"])
def test_codes_and_scales_are_streamed(
    stored: str, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    chosen = ("--base-precision", stored, "--gen-update-interval", "1", "--max-train-steps", "1")
    resident = distill(tiny_t2v, t2v_shards, tmp_path / "resident", *chosen)
    streamed = distill(tiny_t2v, t2v_shards, tmp_path / "streamed", *chosen, "--low-vram")
    assert final_bytes(streamed) == final_bytes(resident)


def test_another_precision_is_told_when_a_run_goes_on(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tiny_t2v, t2v_shards, tmp_path, "--max-train-steps", "1", "--base-precision", "int8")
    finetune(
        tiny_t2v, t2v_shards, tmp_path, "--max-train-steps", "2", "--mixed-precision", "no",
        "--base-precision", "fp8", "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert "base_precision: 'int8' → 'fp8'" in " ".join(capsys.readouterr().err.split())


def test_bf16_is_what_it_is_without_the_option(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(tiny_t2v, t2v_shards, tmp_path, "--max-train-steps", "1")
    distill(
        tiny_t2v, t2v_shards, tmp_path, "--max-train-steps", "2", "--base-precision", "bf16",
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert "changed since the checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--base-precision", "bf16", "--mixed-precision", "no"),
            "--base-precision: found bf16 with --mixed-precision no, which computes in fp32.",
        ),
        (
            ("--base-precision", "nf4", "--strategy", "fsdp"),
            "--base-precision: found nf4 with --strategy fsdp, which shards weights",
        ),
        (
            ("--base-precision", "int8", "--strategy", "zero3"),
            "--base-precision: found int8 with --strategy zero3, which shards weights",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        wantrain(arguments(tiny_t2v, t2v_shards, tmp_path, *options), standalone_mode=False)
    assert str(caught.value).startswith(message)


def test_nf4_without_bitsandbytes_says_what_to_install(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.memory.quantize.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'wandistill\[quant\]'"):
        distill(tiny_t2v, t2v_shards, tmp_path, "--base-precision", "nf4", "--max-train-steps", "1")


def test_a_dry_run_says_it(
    t2v_shards: Path, tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stored in QUANTISED:
        wantrain(
            arguments(tiny_t2v, t2v_shards, tmp_path, "--base-precision", stored, "--dry-run"),
            standalone_mode=False,
        )
        shown = capsys.readouterr().out
        assert json.loads(shown[: shown.index("\n}") + 2])["base_precision"] == stored


@pytest.mark.long
def test_processes_that_hold_the_base_whole_train_on_it_quantised(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    chosen = ("--base-precision", "fp8")
    alone = lora_of(distill(tiny_t2v, t2v_shards, tmp_path / "alone", *RUN, *SINGLE, *chosen))
    out = tmp_path / "out"
    typed(*command(tiny_t2v, t2v_shards, out, *IN_TWO, *chosen, "--strategy", "zero2"))
    assert apart(alone, lora_of(out)) <= 1e-4
