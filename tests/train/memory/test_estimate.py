"""The estimate of --dry-run: counts are exact, activations are what autograd keeps."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import lean_run
from benchmarks.plan_peaks import batch_of, peak_of_updates, recipe_of
from shared.models.spec import read_model_spec
from tests.models import Mode, tiny_model, tiny_transformer
from tests.train.test_distill import SMALL
from train.cli.app import app as wantrain
from train.memory.estimate import Passes, Settings, base_sizes, estimate_of, tokens_of
from train.memory.options import MemoryOptions
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import GENERATOR, Roles
from train.options import Precision

TARGETS = ("q", "k", "v", "ffn.0", "ffn.2")


def kept_by_autograd(precision: Precision, layers: int, *, rank: int, width: int) -> int:
    """Bytes of tensors, other than weights, that a training pass of 2 × 180 tokens keeps."""
    transformer = tiny_transformer(
        "t2v", num_layers=layers, num_attention_heads=3, attention_head_dim=width // 3,
        ffn_dim=5 * width,
    )  # fmt: skip
    if precision == "bf16":
        keep = set(transformer._keep_in_fp32_modules or ())
        for name, parameter in transformer.named_parameters():
            if not keep & set(name.split(".")):
                parameter.data = parameter.data.bfloat16()
    targets = select_targets(transformer, TARGETS)
    roles = Roles(transformer, LoraSpec(rank=rank, alpha=4, targets=targets), seed=1)
    weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep_it(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x_t, text = torch.randn(2, 16, 3, 12, 20), torch.randn(2, 512, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep_it, lambda x: x), roles.role(GENERATOR):
        _ = roles.velocity(x_t, torch.full((2,), 500.0), text, None)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize(("width", "rank"), [(96, 3), (192, 12), (384, 8)])
def test_a_block_keeps_what_the_formula_says(precision: Precision, width: int, rank: int) -> None:
    one, three = (kept_by_autograd(precision, layers, rank=rank, width=width) for layers in (1, 3))
    transformer = tiny_transformer(
        "t2v", num_layers=1, num_attention_heads=3, attention_head_dim=width // 3,
        ffn_dim=5 * width,
    )  # fmt: skip
    memory = MemoryOptions(mixed_precision=precision)
    settings = Settings(samples=2, rank=rank, target_name=TARGETS, roles=2, memory=memory)
    formula = Passes(transformer, False, 180, settings).block_bytes()
    assert formula == pytest.approx((three - one) / 2, rel=0.05)


def test_weights_and_states_are_those_of_a_run(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `benchmarks/lean_run.py`, which counts them while it trains."""
    common = ["--model", str(tiny_t2v), "--shards", str(t2v_shards), *SMALL]
    common += ["--boundary-type", "low"]
    found = tmp_path / "found.json"
    lean_run.measure("held", common, found)
    resident = json.loads(found.read_text())
    folder = tiny_t2v / "transformer_2" / "config.json"
    transformer = type(tiny_transformer("t2v")).from_config(json.loads(folder.read_text()))
    assert sum(base_sizes(transformer, "bf16").values()) == resident["base"]
    capsys.readouterr()
    wantrain(["distill", *common, "--dry-run"], standalone_mode=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    gib = 2**30
    assert f"base {resident['base'] / gib:.2f}," in line and "activations" in line


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "precision", "heads", "inner", "rank", "samples", "checkpointing"),
    [
        ("t2v", "bf16", 2, 704, 8, 2, True),
        ("t2v", "bf16", 2, 704, 8, 2, False),
        ("i2v", "bf16", 3, 2304, 20, 1, True),
    ],
)
def test_the_estimate_is_the_peak_of_real_updates(
    mode: Mode, precision: Precision, heads: int, inner: int, rank: int, samples: int,
    checkpointing: bool, tmp_path: Path,
) -> None:  # fmt: skip
    """Within a tenth of all bytes that live in whole updates of both roles, as torch makes them."""
    tiny_model(
        tmp_path, mode, two_experts=False, num_layers=3, num_attention_heads=heads,
        attention_head_dim=128, ffn_dim=inner,
        **({"added_kv_proj_dim": None} if mode == "i2v" else {}),
    )  # fmt: skip
    spec = read_model_spec(tmp_path)
    transformer = load_base(
        spec, "full", precision=precision, device=torch.device("cpu"),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    memory = MemoryOptions(mixed_precision=precision, gradient_checkpointing=checkpointing)
    settings = Settings(samples=samples, rank=rank, target_name=TARGETS, roles=2, memory=memory)
    grid = (5, 24, 32)
    said = estimate_of(transformer, spec.mode, tokens_of(grid, spec), settings)
    targets = select_targets(transformer, TARGETS)
    roles = Roles(transformer, LoraSpec(rank=rank, alpha=4, targets=targets), seed=1)
    batch = batch_of(spec, grid, samples=samples, text=spec.text_dim)
    negative = torch.zeros(512, spec.text_dim)
    counted = peak_of_updates(roles, recipe_of(spec), batch, negative)
    assert said.total == pytest.approx(max(counted.values()), rel=0.1)
