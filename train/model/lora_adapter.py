"""LoRA on the transformer's blocks: which modules, under which names, with which first weights."""

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from shared.errors import UserError
from shared.models.spec import blocks_of, family_of
from train.functional.rng import counted_rng


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Shape of an adapter: applied as (alpha / rank)·B·A."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names inside a block in diffusers' form, e.g. "attn1.to_q", in the blocks' order."""

    def pattern(self, blocks: str) -> str:
        """The targets in the list `blocks` as peft's regular expression over full module names."""
        inside = "|".join(map(re.escape, self.targets))
        return rf"{re.escape(blocks)}\.\d+\.(?:{inside})"


def select_targets(
    transformer: nn.Module, names: Iterable[str], skipped: Iterable[str] = ()
) -> tuple[str, ...]:
    """The linear layers inside a block that `names` mean, in diffusers' form.

    A name is original ("q", "self_attn.q", "ffn.0") or diffusers' ("to_q", "attn1.to_q",
    "net.0.proj"); a short one means every layer that ends in it. Only blocks are searched: a bare
    "net.0.proj" would also hit the image embedder. Layers with one of `skipped` in either name are
    left out. UserError for a name that matches nothing, and where nothing is left.
    """
    originals = family_of(transformer).original_layers
    first = blocks_of(transformer)[0]
    available = [n for n, module in first.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for wanted in names:
        hits = {
            name
            for name in available
            if _ends_in(name, wanted) or _ends_in(originals.get(name, ""), wanted)
        }
        if not hits:
            known = ", ".join(originals.get(name, name) for name in available)
            raise UserError(
                f"--target-name: {wanted!r} names no linear layer of this transformer's blocks. "
                f"There are: {known} (or diffusers' names: {', '.join(available)})."
            )
        chosen |= hits
    for part in skipped:
        hits = {name for name in available if part in f"{name} {originals.get(name)}"}
        if not hits & chosen:
            raise UserError(
                f"--lora-skip-name: {part!r} is in the name of no layer that gets a LoRA. Those "
                f"are: {', '.join(sorted(chosen))}."
            )
        chosen -= hits
    if not chosen:
        raise UserError(
            "--lora-skip-name: no layer of --target-name is left for a LoRA. Skip fewer."
        )
    return tuple(name for name in available if name in chosen)


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def add_adapter(transformer: nn.Module, spec: LoraSpec, name: str, *, seed: int) -> None:
    """Inject adapter `name` in fp32: A uniform as in peft, from counted randomness; B zero.

    fp32 whatever the base: a step of 1e-6 vanishes in bf16, which is what peft would give here.
    """
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft says int and computes with floats
        target_modules=spec.pattern(family_of(transformer).blocks),
        lora_dropout=0.0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two on purpose
        inject_adapter_in_model(config, transformer, adapter_name=name)
    for key, parameter in adapter_parameters(transformer, name).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in key:
            bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform(a=√5), LoRA's usual start
            rng = counted_rng(seed, "lora init", name, key)
            values = rng.uniform(-bound, bound, size=tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(values))
        else:
            parameter.data.zero_()


def fuse(layer: Any) -> None:
    """Have a layer add its LoRA inside the matmul by B, and scale where there are `rank` columns.

    peft scales B·A·x and then adds it, and scales the gradient on its way back: three passes over
    tokens x width that compute next to nothing. In bf16 here one rounding is left, of the sum.
    """
    layer.forward = partial(_sum, layer)


def _sum(layer: Any, x: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, -2)  # autograd would copy a gradient to change a view in place
    total: torch.Tensor = layer.base_layer(rows)
    if not layer.disable_adapters:
        (name,) = layer.active_adapters
        inner = layer.lora_A[name](rows) * layer.scaling[name]
        total.addmm_(inner, layer.lora_B[name].weight.to(total.dtype).t())
    return total.unflatten(0, x.shape[:-1])


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter under global names: "blocks.0.attn1.to_q.lora_A.weight" …

    The names hold no adapter and no wrapper, so that a checkpoint fits whatever wraps the model.
    """
    marker = f".{name}.weight"
    return {
        key.replace(marker, ".weight"): parameter
        for key, parameter in transformer.named_parameters()
        if ".lora_" in key and key.endswith(marker)
    }
