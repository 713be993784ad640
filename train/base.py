"""Loading one expert of a Wan model as the frozen base."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import nn

from shared.errors import UserError, first_line
from shared.hashing import digest_of
from shared.model_spec import ModelSpec
from shared.original_layout import expert_folder, is_original
from shared.original_weights import converted, load_transformer
from train.flow import Expert

Precision = Literal["bf16", "no"]


_PROBE_BYTES = 4096


def component_of(expert: Expert) -> str:
    """diffusers' component name: `transformer_2` is the low-noise expert."""
    return "transformer_2" if expert == "low" else "transformer"


def load_base(
    spec: ModelSpec,
    expert: Expert,
    *,
    precision: Precision,
    device: torch.device,
    gradient_checkpointing: bool,
) -> nn.Module:
    """The expert's transformer, frozen, on `device`: bf16 (norms, time embedding fp32) or fp32.

    Raises UserError naming the folder when the weights are missing or damaged.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if is_original(spec.folder):
        transformer = load_transformer(
            WanTransformer3DModel, spec.folder, component_of(expert), dtype=dtype
        )
    else:
        transformer = _from_diffusers(spec, component_of(expert), dtype)
    transformer.requires_grad_(False)
    transformer.to(device)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    # What diffusers computes in the weights' own dtype at inference stays so: autocast would take
    # the time embedding from fp32 to bf16 and, on CUDA, the norms of q and k from bf16 to fp32, and
    # the teacher would no longer be the model that users sample from.
    outside_autocast = torch.autocast(device.type, enabled=False)
    for name, module in transformer.named_modules():
        if name == "condition_embedder.time_embedder" or name.endswith((".norm_q", ".norm_k")):
            module.forward = outside_autocast(module.forward)
    return transformer


def _from_diffusers(spec: ModelSpec, component: str, dtype: torch.dtype) -> Any:
    try:
        # Never .to(bf16): it would destroy the modules that diffusers keeps in fp32.
        transformer, report = WanTransformer3DModel.from_pretrained(
            spec.folder,
            subfolder=component,
            torch_dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model: cannot load {spec.folder / component}: {first_line(error)}. "
            "Expected a WanTransformer3DModel in diffusers layout; download the folder again."
        ) from error
    if report["missing_keys"]:  # diffusers fills them with random numbers and only warns
        raise UserError(
            f"model: {spec.folder / component} lacks {len(report['missing_keys'])} weights, the "
            f"first {min(report['missing_keys'])}. Download the folder again."
        )
    return transformer


def base_digest(model: Path, component: str) -> str:
    """Identity of a transformer's weights without reading 28 GB: the first 4 KiB of every tensor.

    Over tensors by diffusers' names, so that neither the layout of the folder nor how the weights
    are cut into files decides. Raises UserError when there are no readable safetensors.
    """
    original = is_original(model)
    folder = expert_folder(model, component) if original else model / component
    parts: dict[str, list[object]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
                for name, tensor in header.items():
                    if name != "__metadata__":
                        begin, end = tensor["data_offsets"]
                        stream.seek(8 + length + begin)
                        start = stream.read(min(end - begin, _PROBE_BYTES))
                        digest = hashlib.sha256(start).hexdigest()
                        parts[name] = [tensor["dtype"], tensor["shape"], digest]
    except (OSError, struct.error, ValueError, KeyError, MemoryError) as error:
        raise UserError(
            f"model: {file} is damaged ({type(error).__name__}: {error}). Download it again."
        ) from error
    if not parts:
        raise UserError(
            f"model: {folder} holds no safetensors; pickled weights are not read. Use a "
            "folder with safetensors."
        )
    if original:
        parts = converted(component, parts)
    return digest_of(sorted(([name, *part] for name, part in parts.items()), key=str))
