"""What a run will need of a device's memory, from configs only: no weight is read.

Weights, LoRAs and optimizer states are counted, from a transformer on torch's meta device.
Activations and work are formulas: for N tokens of width D, M of text, and an inner width F of the
feed-forward layers they are linear in N·D, N·F, M·D. Their factors (`shared.models.family`) were
measured by counting the bytes of all live tensors through whole updates (LoRAs on q, k, v, ffn.0,
ffn.2); `tests/train/memory/test_estimate.py` measures at other sizes, `benchmarks/plan_peaks.py` at
true ones. What no tensor shows (CUDA's context, cuDNN's and NCCL's workspaces, fragments) is not in
it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shared.models.family import Family, Lines, Mode
from shared.models.spec import ModelSpec, blocks_of, family_of
from train.memory.block_offload import blocks_on_device
from train.memory.options import MemoryOptions
from train.memory.quantize import base_linears, is_quantised, quantised_bytes
from train.model.lora_adapter import select_targets
from train.optim.optimizers import state_bytes
from train.options import BasePrecision, Precision

_FP32 = 4
_ROTARY = 8  # bytes for each token and channel of a head: cos and sin
_LATENTS = 8  # fp32 tensors of latents' size beside a pass: noise, x_t, x̂0, scores …
_ON_THE_WAY = 3  # blocks' inputs on the device with --activation-offloading
_GATHERED = 2  # blocks that are whole under a strategy that shards: one that works, the next
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
    """That are trained; 0: the base only samples."""
    average: bool = False
    processes: int = 1
    memory: MemoryOptions


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one process, at the moment when most are in use."""

    parts: Mapping[str, int]
    """By name, what is on the device:

    - base
    - LoRAs: of all roles, fp32
    - optimizers
    - average: of `--ema-decay`
    - activations: what waits for the backward pass, at the largest bucket; or the gradients, which
      take its place, where they are more
    - work of a block: what it needs while it works: in its backward pass with checkpointing, else
      in a pass without gradients beside the activations
    - buffers: of the strategy, whole blocks and gradients on their way
    """
    host: int
    """Of the CPU's memory, page-locked."""

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


def estimate_of(transformer: nn.Module, mode: Mode, tokens: int, settings: Settings) -> Estimate:
    """Of samples of `tokens` each. `transformer` may lie on the meta device. UserError for names of
    layers, or a number of blocks, that it does not have."""
    memory = settings.memory
    passes = Passes(transformer, mode == "ti2v", tokens, settings)
    layers = passes.layers
    sizes = base_sizes(transformer, memory.mixed_precision, memory.base_precision)
    block = sum(
        size for name, size in sizes.items() if name.startswith(f"{passes.family.blocks}.0.")
    )
    outside = sum(sizes.values()) - layers * block
    matrices = lora_matrices(transformer, settings) if settings.roles else []
    one_role = _FP32 * sum(matrices)
    cut = settings.processes if memory.shards_base else 1
    cut_optimizer = settings.processes if memory.shards_moments else 1
    states = sum(state_bytes(memory.chosen_optimizer, n, settings.rank) for n in matrices)
    states += one_role if memory.strategy == "zero2" else 0  # DeepSpeed steps on a copy of its own
    swapped = len(memory.streamed(layers))
    buffers = _BUCKETS.get(memory.strategy or "single", 0)
    if is_quantised(memory.base_precision):  # the largest layer's weight, whole for its matmul
        buffers += passes.width * passes.inner * passes.value_bytes
    if memory.shards_base:
        whole_block = block + settings.roles * one_role // layers
        buffers += _GATHERED * whole_block + outside
    kept, work = passes.activations_and_work()
    return Estimate(
        parts={
            "base": (outside + blocks_on_device(layers, swapped) * block) // cut,
            "LoRAs": settings.roles * one_role // cut,
            "optimizers": settings.roles * states // cut_optimizer,
            "average": one_role if settings.average else 0,
            "activations": max(kept, one_role // cut),
            "work of a block": work,
            "buffers": buffers,
        },
        host=swapped * block
        + (layers * passes.kept_of_block if memory.activation_offloading else 0),
    )


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


def lora_matrices(transformer: nn.Module, settings: Settings) -> list[int]:
    """Number of weights of each matrix of one role's LoRA."""
    targets = select_targets(transformer, settings.target_name, settings.lora_skip_name)
    layers = (block.get_submodule(name) for block in blocks_of(transformer) for name in targets)
    return [
        settings.rank * features
        for layer in layers
        for features in (layer.in_features, layer.out_features)
    ]


@dataclass(frozen=True)
class Passes:
    """What passes of a transformer need beside its weights, by the factors of its family."""

    transformer: Any
    of_time: bool
    """ti2v, where each token has a time of its own."""
    tokens: int
    """Of each sample."""
    settings: Settings

    @property
    def family(self) -> Family:
        return family_of(self.transformer)

    @property
    def layers(self) -> int:
        return len(blocks_of(self.transformer))

    @property
    def width(self) -> int:
        facts = self.transformer.config
        return int(facts.num_attention_heads * facts.attention_head_dim)

    @property
    def inner(self) -> int:
        """Of the feed-forward layers."""
        return int(self.transformer.config.ffn_dim)

    @property
    def value_bytes(self) -> int:
        return 2 if self.settings.memory.mixed_precision == "bf16" else _FP32

    @property
    def kept_of_block(self) -> int:
        """Bytes that wait for a checkpointed block's backward pass, on the device or not. An
        output of self-attention is as large as hidden states."""
        hidden_states = self.settings.samples * self.tokens * self.width * self.value_bytes
        return hidden_states * (2 if self.settings.memory.keep_attention else 1)

    def block_bytes(self) -> float:
        """What autograd keeps of one block that is not checkpointed, for all samples of a pass."""
        factors = self.family.memory
        wide, deep, text, low = factors.kept[self.settings.memory.mixed_precision]
        wide += factors.kept_of_time if self.of_time else 0
        kept = self.tokens * (wide * self.width + deep * self.inner + low * self.settings.rank)
        kept += text * self.family.text_tokens * self.width
        return self.settings.samples * kept + self._lora_copies()

    def _lora_copies(self) -> float:
        """Autocast's, in bf16, of a block's LoRA."""
        if self.settings.memory.mixed_precision == "no":
            return 0
        return 2 * sum(lora_matrices(self.transformer, self.settings)) / self.layers

    def _most(self, lines: Lines, time: float) -> float:
        """Of lines in D and F, for all tokens."""
        bytes_each = max(wide * self.width + deep * self.inner for wide, deep in lines)
        return self.settings.samples * self.tokens * (bytes_each + time * self.width)

    def activations_and_work(self) -> tuple[int, int]:
        """What waits for the backward pass, and what is needed beside it for the pass or block that
        works."""
        facts, factors, samples = self.transformer.config, self.family.memory, self.settings.samples
        memory, precision = self.settings.memory, self.settings.memory.mixed_precision
        latents = math.prod((_FP32, *facts.patch_size, facts.out_channels, self.tokens))
        beside = self.tokens * facts.attention_head_dim * _ROTARY + samples * _LATENTS * latents
        passes = factors.forward_with_time if self.of_time else factors.forward
        forward = int(self._most(passes[precision], 0) + beside)
        if not self.settings.roles:  # nothing is trained: no pass has a graph
            return 0, forward
        if memory.gradient_checkpointing:
            on_the_way = _ON_THE_WAY if memory.activation_offloading else self.layers
            kept = min(self.layers, on_the_way) * self.kept_of_block
            if memory.keep_attention:  # sums of its softmax, one for each query
                kept += self.layers * samples * self.tokens * facts.num_attention_heads * _FP32
            time = factors.backward_of_time[precision] if self.of_time else 0
            work = self._most(factors.backward[precision], time)
            work += samples * factors.kept[precision][2] * self.family.text_tokens * self.width
            return int(kept), int(work + beside + self._lora_copies())
        return int(self.layers * self.block_bytes()), forward
