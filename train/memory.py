"""What a run will need of a device's memory, from configs alone: no weight is read.

Weights, LoRAs and optimizer states are counted, from a transformer on torch's meta device.
Activations are a formula: what autograd keeps of one block, for N tokens of width D, M of text, and
an inner width F of the feed-forward layers, is linear in N·D, N·F, M·D. Its factors were measured
with `torch.autograd.graph.saved_tensors_hooks` (bf16 and fp32, LoRAs on q, k, v, ffn.0, ffn.2), and
`tests/train/test_memory_estimate.py` measures them again at other sizes.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from shared.model_spec import MAX_TEXT_TOKENS
from shared.original_layout import is_original
from train.adam8bit import moment_bytes
from train.base import Precision, component_of
from train.lora import select_targets
from train.quantised import BasePrecision, base_linears, is_quantised, quantised_bytes
from train.run import Run

# Bytes that autograd keeps of a block, for each of N·D, N·F, M·D, and N·rank.
_KEPT = {"bf16": (42, 4, 8.4, 16), "no": (60.3, 8, 12.1, 32)}
_ADAM = 8  # two fp32 moments for each weight
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes."""

    base: int
    loras: int
    """Of all roles, fp32, with the gradients of the one that is being trained."""
    optimizers: int
    average: int
    """Of `--ema-decay`."""
    activations: int
    """What autograd keeps of the pass that trains, at the largest bucket."""

    @property
    def total(self) -> int:
        return self.base + self.loras + self.optimizers + self.average + self.activations

    def line(self) -> str:
        """For --dry-run."""
        gib = 2**30
        average = f", average {self.average / gib:.2f}" if self.average else ""
        return (
            f"memory   about {self.total / gib:.1f} GiB: base {self.base / gib:.2f}, LoRAs and "
            f"gradients {self.loras / gib:.2f}, optimizers {self.optimizers / gib:.2f}{average}, "
            f"activations {self.activations / gib:.2f}; and what the device's libraries take"
        )


def estimate(run: Run) -> Estimate | None:
    """None for models in Wan's original layout, whose configs only their weights tell."""
    config, spec = run.config, run.spec
    if is_original(spec.folder):
        return None
    facts = WanTransformer3DModel.load_config(
        spec.folder, subfolder=component_of(run.objective.expert)
    )
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(facts)
    matrices = lora_matrices(transformer, config.target_name, config.rank)
    one_role = _FP32 * sum(matrices)
    roles = len(run.objective.learning_rates)
    grids = [
        bucket.latent_shape(spec.latent_channels, spec.stride)[1:]
        for bucket in run.data.filled_buckets()
    ]
    tokens = max(
        math.prod(side // patch for side, patch in zip(grid, spec.patch, strict=True))
        for grid in grids
    )
    return Estimate(
        base=base_bytes(transformer, config.mixed_precision, config.base_precision),
        loras=(roles + 1) * one_role,
        optimizers=roles
        * sum(moment_bytes(n) if config.use_8bit_adam else _ADAM * n for n in matrices),
        average=one_role if config.ema_decay else 0,
        activations=activation_bytes(
            transformer,
            samples=config.train_batch_size,
            tokens=tokens,
            rank=config.rank,
            precision=config.mixed_precision,
            checkpointing=config.gradient_checkpointing,
        ),
    )


def base_bytes(
    transformer: nn.Module, precision: Precision, stored: BasePrecision | None = None
) -> int:
    """Of the weights as `open_session` holds them: some stay fp32, as in diffusers; the linear
    layers of blocks may be quantised."""
    kept = set(transformer._keep_in_fp32_modules or ())  # type: ignore[arg-type]
    small = 2 if precision == "bf16" else _FP32
    sizes = {
        name: parameter.numel() * (_FP32 if kept & set(name.split(".")) else small)
        for name, parameter in transformer.named_parameters()
    }
    if is_quantised(stored):
        for name, linear in base_linears(transformer).items():
            rows, columns = linear.weight.shape
            sizes[f"{name}.weight"] = quantised_bytes(rows, columns, stored)
    return sum(sizes.values())


def lora_matrices(transformer: nn.Module, target_name: tuple[str, ...], rank: int) -> list[int]:
    """Number of weights of each matrix of one role's LoRA. UserError for names that are none."""
    targets = select_targets(transformer, target_name)
    return [
        rank * features
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and name.split(".", 2)[2] in targets
        for features in (module.in_features, module.out_features)
    ]


def activation_bytes(
    transformer: nn.Module,
    *,
    samples: int,
    tokens: int,
    rank: int,
    precision: Precision,
    checkpointing: bool,
) -> int:
    """What is kept for the backward pass of `samples` of `tokens` each.

    With checkpointing: every block's input, and all of one block, which is computed again.
    """
    facts = transformer.config
    width = facts.num_attention_heads * facts.attention_head_dim  # type: ignore[union-attr, operator]
    inner, layers = facts.ffn_dim, facts.num_layers  # type: ignore[union-attr]
    wide, deep, text, low = _KEPT[precision]
    block = tokens * (wide * width + deep * inner + low * rank)  # type: ignore[operator]
    block += text * MAX_TEXT_TOKENS * width
    inputs = tokens * width * (2 if precision == "bf16" else _FP32)
    kept = layers * inputs + block if checkpointing else layers * block  # type: ignore[operator]
    return int(samples * kept)
