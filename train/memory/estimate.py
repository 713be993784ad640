"""What a run will need of a device's memory, from configs alone: no weight is read.

Weights, LoRAs and optimizer states are counted, from a transformer on torch's meta device.
Activations and work are formulas: for N tokens of width D, M of text, and an inner width F of the
feed-forward layers they are linear in N·D, N·F, M·D. Their factors were measured by counting the
bytes of all live tensors through whole updates (LoRAs on q, k, v, ffn.0, ffn.2);
`tests/train/memory/test_estimate.py` measures at other sizes, `benchmarks/plan_peaks.py` at true
ones. What no tensor shows (CUDA's context, cuDNN's and NCCL's workspaces, fragments) is not in it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from shared.models.spec import MAX_TEXT_TOKENS, ModelSpec
from train.memory.block_offload import blocks_on_device
from train.memory.options import MemoryOptions
from train.memory.quantize import base_linears, is_quantised, quantised_bytes
from train.model.lora_adapter import select_targets
from train.optim.adamw8bit import moment_bytes
from train.options import BasePrecision, Precision

_ADAM = 8  # two fp32 moments for each weight
_FP32 = 4
# Bytes that autograd keeps of a block, for each of N·D, N·F, M·D, and N·rank.
_KEPT = {"bf16": (42, 4, 8.4, 16), "no": (60.3, 8, 12.1, 32)}
# ti2v tells every token its own time: what is made of it is as wide as six hidden states.
_KEPT_OF_TIME = 32
# Most bytes that live while a checkpointed block is computed again and differentiated, for each of
# N·D and N·F. Two moments compete: in its attention and in its feed-forward layers.
_BACKWARD = {"bf16": ((61.3, 3.6), (44, 7.9)), "no": ((84, 7), (60.5, 15.9))}
_BACKWARD_OF_TIME = {"bf16": 44, "no": 56}
# The same of a pass without gradients; for ti2v.
_PASS = {"bf16": ((20, 0), (8.6, 5.8)), "no": ((40, 0), (16.4, 11.8))}
_PASS_WITH_TIME = {"bf16": ((55.7, 3.8),), "no": ((88, 7.5),)}
_ROTARY = 8  # bytes for each token and channel of a head: cos and sin
_LATENTS = 8  # fp32 tensors of latents' size beside a pass: noise, x_t, x̂0, scores …
_ON_THE_WAY = 3  # blocks' inputs on the device with --activation-offloading
_GATHERED = 2  # blocks that are whole under a strategy that cuts: one that works, the next
# DeepSpeed's buffers for gradients, `reduce_bucket_size` of launch_configs each, two in stage 2.
_BUCKETS = {"zero2": 2 * 50_000_000 * _FP32, "zero3": 50_000_000 * _FP32}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides about memory, beside the model and the shape of a sample."""

    samples: int
    """Of one pass."""
    rank: int
    target_name: tuple[str, ...]
    lora_skip_name: tuple[str, ...] = ()
    roles: int
    average: bool = False
    processes: int = 1
    memory: MemoryOptions


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one process, at the moment when most are in use."""

    base: int
    loras: int
    """Of all roles, fp32."""
    optimizers: int
    average: int
    """Of `--ema-decay`."""
    activations: int
    """What waits for the backward pass, at the largest bucket; or the gradients, which take its
    place, where they are more."""
    work: int
    """What a block needs while it works: in its backward pass with checkpointing, else in a pass
    without gradients beside the activations."""
    buffers: int
    """Of the strategy: whole blocks, gradients on their way."""
    host: int
    """Of the CPU's memory, page-locked."""

    @property
    def parts(self) -> dict[str, int]:
        """By name, what is on the device."""
        return {
            "base": self.base,
            "LoRAs": self.loras,
            "optimizers": self.optimizers,
            "average": self.average,
            "activations": self.activations,
            "work of a block": self.work,
            "buffers": self.buffers,
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def line(self) -> str:
        """For --dry-run."""
        gib = 2**30
        parts = ", ".join(f"{name} {part / gib:.2f}" for name, part in self.parts.items() if part)
        host = f"; and {self.host / gib:.1f} GiB of CPU memory" if self.host else ""
        return (
            f"memory   about {self.total / gib:.1f} GiB: {parts}; and what the device's libraries "
            f"take{host}"
        )


def tokens_of(grid: tuple[int, ...], spec: ModelSpec) -> int:
    """Of one sample whose latents are (T, H, W)."""
    return math.prod(side // patch for side, patch in zip(grid, spec.patch, strict=True))


def estimate_of(
    transformer: nn.Module, mode: Literal["t2v", "i2v", "ti2v"], tokens: int, settings: Settings
) -> Estimate:
    """Of samples of `tokens` each. `transformer` may lie on the meta device. UserError for names of
    layers, or a number of blocks, that it does not have."""
    facts: Any = transformer.config
    layers: int = facts.num_layers
    memory = settings.memory
    sizes = base_sizes(transformer, memory.mixed_precision, memory.base_precision)
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.0."))
    outside = sum(sizes.values()) - layers * block
    matrices = lora_matrices(transformer, settings)
    one_role = _FP32 * sum(matrices)
    cut = settings.processes if memory.cuts_base else 1
    cut_optimizer = settings.processes if memory.cuts_moments else 1
    # DeepSpeed steps on a copy of its own.
    states = _ADAM + (_FP32 if memory.strategy == "zero2" else 0)
    moments = sum(moment_bytes(n) if memory.use_8bit_adam else states * n for n in matrices)
    swapped = len(memory.streamed(layers))
    largest = _width(transformer) * int(facts.ffn_dim)
    kept, work = activations_and_work(transformer, mode, tokens, settings)
    inputs = _block_input(transformer, tokens, settings)
    return Estimate(
        base=(outside + blocks_on_device(layers, swapped) * block) // cut,
        loras=settings.roles * one_role // cut,
        optimizers=settings.roles * moments // cut_optimizer,
        average=one_role if settings.average else 0,
        activations=max(kept, one_role // cut),
        work=work,
        buffers=_buffers(settings, block, outside, one_role, layers, largest),
        host=swapped * block + (layers * inputs if memory.activation_offloading else 0),
    )


def _buffers(
    settings: Settings, block: int, outside: int, one_role: int, layers: int, largest: int
) -> int:
    memory = settings.memory
    buffers = _BUCKETS.get(memory.strategy or "single", 0)
    if is_quantised(memory.base_precision):  # the largest layer's weight, whole for its matmul
        buffers += largest * (2 if memory.mixed_precision == "bf16" else _FP32)
    if memory.cuts_base:
        whole_block = block + settings.roles * one_role // layers
        buffers += _GATHERED * whole_block + outside
    return buffers


def base_sizes(
    transformer: nn.Module, precision: Precision, stored: BasePrecision | None = None
) -> dict[str, int]:
    """Bytes of each weight as `open_session` holds it: some stay fp32, as in diffusers; the linear
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
    return sizes


def base_bytes(
    transformer: nn.Module, precision: Precision, stored: BasePrecision | None = None
) -> int:
    """Of all of them."""
    return sum(base_sizes(transformer, precision, stored).values())


def lora_matrices(transformer: nn.Module, settings: Settings) -> list[int]:
    """Number of weights of each matrix of one role's LoRA."""
    targets = select_targets(transformer, settings.target_name, settings.lora_skip_name)
    return [
        settings.rank * features
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and name.split(".", 2)[2] in targets
        for features in (module.in_features, module.out_features)
    ]


def _block_input(transformer: nn.Module, tokens: int, settings: Settings) -> int:
    width = _width(transformer)
    each = 2 if settings.memory.mixed_precision == "bf16" else _FP32
    return settings.samples * tokens * width * each


def _layers(transformer: nn.Module) -> int:
    facts: Any = transformer.config
    return int(facts.num_layers)


def _width(transformer: nn.Module) -> int:
    facts: Any = transformer.config
    return int(facts.num_attention_heads * facts.attention_head_dim)


def block_bytes(transformer: nn.Module, mode: str, tokens: int, settings: Settings) -> float:
    """What autograd keeps of one block that is not checkpointed, for all samples of a pass."""
    facts: Any = transformer.config
    width, inner, precision = _width(transformer), facts.ffn_dim, settings.memory.mixed_precision
    wide, deep, text, low = _KEPT[precision]
    wide += _KEPT_OF_TIME if mode == "ti2v" else 0
    kept = tokens * (wide * width + deep * inner + low * settings.rank)
    kept += text * MAX_TEXT_TOKENS * width
    return settings.samples * kept + _lora_copies(transformer, settings)


def _lora_copies(transformer: nn.Module, settings: Settings) -> float:
    """Autocast's, in bf16, of a block's LoRA."""
    if settings.memory.mixed_precision == "no":
        return 0
    return 2 * sum(lora_matrices(transformer, settings)) / _layers(transformer)


def activations_and_work(
    transformer: nn.Module, mode: str, tokens: int, settings: Settings
) -> tuple[int, int]:
    """What waits for the backward pass, and what is needed beside it for the pass or block that
    works."""
    facts: Any = transformer.config
    inner, layers = facts.ffn_dim, facts.num_layers
    width, of_time = _width(transformer), mode == "ti2v"
    memory, precision = settings.memory, settings.memory.mixed_precision

    def most(lines: tuple[tuple[float, float], ...], time: float) -> float:
        """Of lines in D and F, for all tokens."""
        bytes_each = max(wide * width + deep * inner for wide, deep in lines)
        return settings.samples * tokens * (bytes_each + time * width)

    rotary = tokens * facts.attention_head_dim * _ROTARY
    latents = math.prod((_FP32, *facts.patch_size, facts.out_channels, tokens))
    beside = rotary + settings.samples * _LATENTS * latents
    if memory.gradient_checkpointing:
        blocks = min(layers, _ON_THE_WAY) if memory.activation_offloading else layers
        kept = blocks * _block_input(transformer, tokens, settings)
        work = most(_BACKWARD[precision], _BACKWARD_OF_TIME[precision] if of_time else 0)
        work += settings.samples * _KEPT[precision][2] * MAX_TEXT_TOKENS * width
        return int(kept), int(work + beside + _lora_copies(transformer, settings))
    passes = _PASS_WITH_TIME if of_time else _PASS
    kept = layers * block_bytes(transformer, mode, tokens, settings)
    return int(kept), int(most(passes[precision], 0) + beside)
