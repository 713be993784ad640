"""Loading one transformer as the frozen base: an expert of a model, or own weights in its place,
with other LoRAs merged into it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared.errors import UserError
from shared.io.hashing import digest_of
from shared.models.original_layout import expert_folder, is_original, opened
from shared.models.original_weights import converted
from shared.models.spec import ModelSpec, family_of, resolve_model
from shared.models.weight_files import weight_files
from shared.models.weights import check_component, load_component
from train.distributed.load_once import read_once
from train.distributed.process_group import SINGLE, Ranks
from train.model.custom_weights import check_own, empty_transformer, load_own, own_files
from train.model.lora_files import check_fits_model, read_lora
from train.model.lora_source import ScaledLora
from train.options import Expert, Precision

_PROBE_BYTES = 4096


def component_of(expert: Expert) -> str:
    """diffusers' component name: `transformer_2` is the low-noise expert."""
    return "transformer_2" if expert == "low" else "transformer"


@dataclass(frozen=True, kw_only=True)
class Base:
    """Weights of one transformer where they are not simply the model's."""

    own: Path | None = None
    """In place of the model's, in any form that `train.model.custom_weights` reads."""
    merged: tuple[ScaledLora, ...] = ()
    """Added to them, in this order."""

    @classmethod
    def parse(cls, own: Path | None, merged: Sequence[str] | None) -> "Base":
        """From --transformer-path and the --base-lora options. Raises UserError."""
        scaled = (ScaledLora.parse(text, "--base-lora") for text in merged or ())
        return cls(own=own, merged=tuple(scaled))

    @property
    def without_folders(self) -> "Base":
        """By names alone, for what others may read."""
        merged = tuple(lora.without_folder for lora in self.merged)
        return Base(own=self.own and Path(self.own.name), merged=merged)

    def describe(self) -> str:
        """In words; empty where there is nothing to say."""
        own = [f"weights of {self.own} in place of the model's"] if self.own else []
        return ", ".join(own + [f"{lora} merged in" for lora in self.merged])

    def notes(self) -> list[str]:
        """What to tell of the LoRA files, e.g. that one says no alpha."""
        return [note for lora in self.merged if (note := read_lora(lora.path).note)]

    def fetched(self, model: str, spec: ModelSpec, component: str) -> "Base":
        """Itself, its weights here where `model` is a hub id. UserError as of `check`."""
        resolve_model(model, [component] if self.own is None else [])
        self.check(spec, component)
        return self

    def check(self, spec: ModelSpec, component: str) -> None:
        """UserError unless weights and LoRAs fit the model by configs, names and shapes.

        The model's own weights need not be there yet.
        """
        if self.own is not None:
            check_own(self.own, spec, component)
        else:
            check_component(spec.family, spec.folder, component)
        for lora in self.merged:
            check_fits_model(read_lora(lora.path), spec, component)


MODELS_OWN = Base()


def load_base(
    spec: ModelSpec,
    expert: Expert,
    *,
    precision: Precision,
    device: torch.device,
    gradient_checkpointing: bool,
    base: Base = MODELS_OWN,
    sharing: Ranks = SINGLE,
) -> nn.Module:
    """The expert's transformer, frozen: bf16 (norms, time embedding fp32) or fp32.

    It lies on the CPU: whole it need not fit on `device`, where LoRAs that are merged are computed.
    Of ranks that will shard it (`sharing`) only the first reads it and holds its values. Raises
    UserError naming the folder when the weights are missing or damaged.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    component = component_of(expert)

    def read() -> nn.Module:
        weights: nn.Module = load_weights(spec, component, dtype=dtype, own=base.own)
        merge(weights, base.merged, device)
        return weights

    transformer: Any = read_once(sharing, read, lambda: empty_transformer(spec, component))
    transformer.requires_grad_(False)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing(_recompute)
    keep_from_autocast(transformer, device)
    return transformer


# Nothing inside of a block is random; to keep the generators' states would wait for the GPU.
_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def keep_from_autocast(transformer: nn.Module, device: torch.device) -> None:
    """What diffusers computes in the weights' own dtype at inference stays so.

    Autocast would take the time embedding from fp32 to bf16 and, on CUDA, the norms of q and k from
    bf16 to fp32, and the teacher would no longer be the model that users sample from.
    """
    outside_autocast = torch.autocast(device.type, enabled=False)
    endings = family_of(transformer).outside_autocast
    for name, module in transformer.named_modules():
        if name.endswith(endings):
            module.forward = outside_autocast(module.forward)


def load_weights(spec: ModelSpec, component: str, *, dtype: torch.dtype, own: Path | None) -> Any:
    """One of the model's transformers as diffusers loads it in `dtype`. Raises UserError."""
    if own is not None:
        return load_own(own, spec, component, dtype=dtype)
    # Never .to(bf16): it would destroy the modules that diffusers keeps in fp32.
    return load_component(spec.family, spec.folder, component, dtype=dtype)


@torch.no_grad()
def merge(transformer: nn.Module, merged: Sequence[ScaledLora], device: torch.device) -> None:
    """Add LoRAs that fit to the weights: in fp32, in their order, each result in its dtype.

    Computed on `device`, wherever the weights are.
    """
    for chosen in merged:
        file = read_lora(chosen.path)
        for name in file.lora.changed:
            weight = transformer.get_parameter(name)
            weight.copy_(
                file.added_to(name, weight, chosen.strength, dtype=weight.dtype, device=device)
            )


def base_digest(model: Path, component: str, base: Base = MODELS_OWN) -> str:
    """Identity of a base without reading 28 GB: the first 4 KiB of every tensor, the LoRAs whole.

    Over tensors by diffusers' names, so that neither the layout of the folder nor how the weights
    are cut into files decides. Raises UserError when there are no readable safetensors.
    """
    files = weight_files(model, component) if base.own is None else own_files(base.own, component)
    if not files:
        folder = expert_folder(model, component) if is_original(model) else model / component
        raise UserError(
            f"model: {folder} holds no safetensors; pickled weights are not read. Use a folder "
            "with safetensors."
        )
    parts: dict[str, list[object]] = {}
    for file in files:
        parts |= _probes(file)
    parts = converted(component, parts)
    weights = digest_of(sorted(([name, *part] for name, part in parts.items()), key=str))
    if base.merged:
        return digest_of([weights, *([lora.digest, lora.strength] for lora in base.merged)])
    return weights


def _probes(file: Path) -> dict[str, list[object]]:
    """Tensor → dtype, shape and digest of its first bytes."""
    probes: dict[str, list[object]] = {}
    with opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
            stored, tensor = tensors.get_slice(name), tensors.get_tensor(name)  # mapped
            start = tensor.flatten()[: _PROBE_BYTES // tensor.itemsize].view(torch.uint8)
            digest = hashlib.sha256(start.numpy()).hexdigest()
            probes[name] = [stored.get_dtype(), stored.get_shape(), digest]
    return probes
