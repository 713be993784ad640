"""Loading one expert of a Wan model as the frozen base."""

import hashlib
import struct
from pathlib import Path
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import nn

from shared.errors import UserError
from shared.hashing import digest_of
from shared.model_spec import ModelSpec
from train.flow import Expert

Precision = Literal["bf16", "no"]


_DIGEST_PROBES = 16
_PROBE_BYTES = 65536


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
    component = component_of(expert)
    try:
        # Never .to(bf16): it would destroy the modules that diffusers keeps in fp32.
        transformer, report = WanTransformer3DModel.from_pretrained(
            spec.folder,
            subfolder=component,
            torch_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model: cannot load {spec.folder / component}: {str(error).splitlines()[0]}. "
            "Expected a WanTransformer3DModel in diffusers layout; download the folder again."
        ) from error
    if report["missing_keys"]:  # diffusers fills them with random numbers and only warns
        raise UserError(
            f"model: {spec.folder / component} lacks {len(report['missing_keys'])} weights, the "
            f"first {min(report['missing_keys'])}. Download the folder again."
        )
    transformer.requires_grad_(False)
    transformer.to(device)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    # diffusers computes the time embedding in fp32 at inference; autocast would take it to bf16,
    # and the teacher would no longer be the model that users sample from.
    embedder = transformer.condition_embedder.time_embedder
    embedder.forward = torch.autocast(device.type, enabled=False)(embedder.forward)
    return transformer


def base_digest(folder: Path) -> str:
    """Identity of a transformer's weights without reading 28 GB: of each file its name-free header
    and size, and 16 probes of 64 KiB spread over the tensors.
    """
    parts: list[object] = []
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            (header,) = struct.unpack("<Q", stream.read(8))
            digest.update(stream.read(min(header, size)))
            for probe in range(_DIGEST_PROBES):
                stream.seek(8 + header + (size - 8 - header) * probe // _DIGEST_PROBES)
                digest.update(stream.read(_PROBE_BYTES))
        parts.append([size, digest.hexdigest()])
    return digest_of(parts)
