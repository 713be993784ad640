"""How long an update should take, computed: no GPU is used.

    python benchmarks/roofline.py [--model wan2.2-i2v-a14b] [--size 480x832] [--json FILE]

The real transformer with its LoRAs makes the passes of an update on torch's fake tensors, which
have shapes and no data, and each operation is counted as it is dispatched: FLOPs of matmuls, FLOPs
of attention (its backward pass as five products for two), and bytes that every other operation
reads and writes. Assumed rates make seconds of them, one operation after another:

- matmuls and attention at a share of the card's dense bf16 peak (`MATMULS`, `FLASH_3`, `FLASH_2`)
- all else at a share of the bandwidth of its memory; RMSNorm as one kernel (torch >= 2.9)
- not counted: launches, data, noise, the optimizer, copies between cards

An update's rollout has (steps + 1) / 2 passes on average. Counted at 2 and 3 blocks; each further
one costs as much as the third.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from plan_peaks import TARGETS, batch_of, with_fake_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from shared.format.buckets import Bucket
from shared.models.spec import ModelSpec, read_model_spec
from shared.models.wan import PUBLISHED, write_configs
from train.bench.flops import bf16_peak
from train.data.batches import Batch
from train.memory.keep_attention import keep_attention
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles

CARD, BANDWIDTH = "NVIDIA H100 80GB HBM3", 3.35e12
MATMULS, MEMORY = 0.70, 0.85
# Shares of the peak, forward and backward: about what FlashAttention-3's paper (arXiv:2407.08608)
# shows for heads of 128 channels, without a mask, at 16k tokens.
FLASH_3, FLASH_2 = (0.65, 0.55), (0.37, 0.33)
_NO_PASS = re.compile("^prim::|empty|_unsafe_view")


@dataclass(frozen=True)
class Work:
    """Of a pass."""

    matmuls: float = 0
    """FLOPs, like the next two."""
    attention: float = 0
    attention_back: float = 0
    passes: float = 0
    """Bytes."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * one for one in astuple(self)))

    def seconds(self, attention: tuple[float, float]) -> float:
        """At the assumed rates."""
        peak = bf16_peak(CARD)
        assert peak is not None
        forward, backward = attention
        flops = self.matmuls / MATMULS + self.attention / forward + self.attention_back / backward
        return flops / peak + self.passes / (MEMORY * BANDWIDTH)

    def limit(self) -> float:
        """Seconds at the card's peak, nothing but matmuls and attention."""
        peak = bf16_peak(CARD)
        assert peak is not None
        return (self.matmuls + self.attention + self.attention_back) / peak


class Counting(TorchDispatchMode):
    """Adds up the work of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict.fromkeys((field.name for field in fields(Work)), 0.0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if "attention" in func.name():
            back = "backward" in func.name()
            query, key = args[1:3] if back else args[:2]
            products = 5 if back else 2
            work = products * 2 * query.numel() * key.shape[-2]
            self.found["attention_back" if back else "attention"] += work
        elif func.name() == "aten::addmm_":
            self.found["matmuls"] += 2 * args[1].numel() * args[2].shape[1]
        elif packet in flop_registry:
            self.found["matmuls"] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif not (func.is_view or _NO_PASS.search(func.name())):
            touched = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.found["passes"] += sum(min(t.nbytes, _storage(t)) for t in touched)
        return out


def _storage(tensor: torch.Tensor) -> int:
    """Bytes: of an expanded tensor fewer than its own."""
    return tensor.untyped_storage().nbytes()


class _OneKernel(torch.autograd.Function):
    """Reads and writes as much as a fused norm."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.neg()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return ctx.saved_tensors[0] + gradient


def passes_of(
    config: dict[str, Any], spec: ModelSpec, grid: tuple[int, ...], rank: int, layers: int,
    *, fused: bool, kept: bool,
) -> dict[str, Work]:  # fmt: skip
    """Work of a pass of the teacher, of a role without a gradient, and of one that trains:
    forward, and backward with what checkpointing computes again; and the same without that."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config | {"num_layers": layers})
    transformer.patch_embedding.to(torch.bfloat16)  # by which Roles knows what to compute in
    lora = LoraSpec(rank=rank, alpha=rank / 2, targets=select_targets(transformer, TARGETS))
    roles = Roles(transformer, lora, seed=1, fused=fused)
    for module in transformer.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = _OneKernel.apply
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        with_fake_weights(transformer)
        batch = batch_of(spec, grid, samples=1, text=config["text_dim"])
        with torch.no_grad():
            found["teacher"] = _counted(roles, None, batch)
            found["role"] = _counted(roles, GENERATOR, batch)
        found["without recomputing"] = _counted(roles, GENERATOR, batch)
        transformer.enable_gradient_checkpointing(*([keep_attention] if kept else []))
        found["trains"] = _counted(roles, GENERATOR, batch)
    return found


def _counted(roles: Roles, role: str | None, batch: Batch) -> Work:
    counting = Counting()
    with counting, roles.role(role):
        time = torch.full((1,), 500.0)
        v = roles.velocity(batch.latents, time, batch.text, batch.condition, batch.image)
        if v.requires_grad:
            v.backward(torch.empty_like(v))
    return Work(**counting.found)


def updates_of(passes: Mapping[str, Work], steps: int, trains: str = "trains") -> dict[str, Work]:
    """Role → work of an update, on average."""
    before = passes["role"] * ((steps - 1) / 2)
    critic = before + passes["role"] + passes[trains]
    # its rollout's last step trains; then critic, and teacher with guidance
    generator = before + passes[trains] + passes["role"] + passes["teacher"] * 2
    return {CRITIC: critic, GENERATOR: generator}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PUBLISHED, default="wan2.2-i2v-a14b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--size", default="480x832", metavar="HxW")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=4, help="that a rollout may end at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_configs(PUBLISHED[given.model], Path(folder))
        spec = read_model_spec(Path(folder))
    config = PUBLISHED[given.model].transformer_config()
    height, width = map(int, given.size.split("x"))
    bucket = Bucket(height, width, given.frames)
    grid = bucket.latent_shape(spec.latent_channels, spec.stride)[1:]

    def passes(*, fused: bool = False, kept: bool = False) -> dict[str, Work]:
        two, three = (
            passes_of(config, spec, grid, given.rank, layers, fused=fused, kept=kept)
            for layers in (2, 3)
        )
        more = config["num_layers"] - 3
        return {name: three[name] + (three[name] + two[name] * -1) * more for name in three}

    plain = passes()
    rows = {
        "today": (plain, FLASH_3),
        "today with FlashAttention 2": (plain, FLASH_2),
        "--keep-attention": (passes(kept=True), FLASH_3),
        "--fused-lora": (passes(fused=True), FLASH_3),
        "both": (passes(fused=True, kept=True), FLASH_3),
    }
    seconds = {
        name: {role: work.seconds(rate) for role, work in updates_of(of, given.steps).items()}
        for name, (of, rate) in rows.items()
    }
    both = updates_of(rows["both"][0], given.steps)
    seconds["both, and no pass over memory (more than --compile can do)"] = {
        role: Work(*astuple(work)[:3]).seconds(FLASH_3) for role, work in both.items()
    }
    bare = updates_of(plain, given.steps, "without recomputing")
    seconds["limit: the card's peak, nothing computed again"] = {
        role: work.limit() for role, work in bare.items()
    }
    print(f"computed, not measured: {given.model}, {bucket}, rank {given.rank}, {CARD}\n")
    print("| | critic s | generator s | of today |\n|---|---|---|---|")
    today = seconds["today"]
    for name, of in seconds.items():
        ratio = " / ".join(f"{of[role] / today[role]:.2f}" for role in (CRITIC, GENERATOR))
        print(f"| {name} | {of[CRITIC]:.1f} | {of[GENERATOR]:.1f} | {ratio} |")
    print("\n| pass | matmul TFLOP | attention | backward | GB by others | s |")
    print("|---|---|---|---|---|---|")
    for name, work in plain.items():
        tera = (work.matmuls / 1e12, work.attention / 1e12, work.attention_back / 1e12)
        numbers = (*tera, work.passes / 1e9)
        cells = [*(f"{number:,.0f}" for number in numbers), f"{work.seconds(FLASH_3):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    if given.json is not None:
        given.json.write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
