"""LoRA files that others load, and what they carry about their training.

Each form has a trap (brief, section 5): diffusers takes rank and alpha from the metadata alone and
rejects `.alpha` keys; ComfyUI takes alpha from a tensor and without it applies the LoRA at the
strength of alpha = rank.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from shared import __version__
from shared.durable import write_bytes
from shared.errors import UserError, first_line
from shared.model_spec import Mode
from train.dmd import Pairing
from train.flow import Expert, Schedule
from train.lora import DIFFUSERS_TO_ORIGINAL, LoraSpec
from train.lora_files import read_metadata

METADATA_KEY = "wandistill"
DIFFUSERS_PREFIX = "transformer."  # for both experts: diffusers ignores "transformer_2." keys
COMFYUI_PREFIX = "diffusion_model."
FORMS = ("diffusers", "comfyui")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a LoRA file says about its training, and what sampling needs to reproduce it."""

    expert: Expert
    mode: Mode
    denoising_step_indices_list: tuple[float, ...]
    flow_shift: float
    boundary: float | None
    pairing: Pairing
    base: str
    """Digest of the transformer that it was trained on."""
    rank: int
    alpha: float
    generator_updates: int
    recipe: dict[str, Any]
    """The other settings of the run, for people."""
    version: str = __version__

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            indices=self.denoising_step_indices_list, shift=self.flow_shift, boundary=self.boundary
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def read_provenance(path: Path) -> Provenance:
    """The provenance in a LoRA file of either form. UserError when it is no such file."""
    metadata = read_metadata(path)
    if METADATA_KEY not in metadata:
        raise UserError(
            f"LoRA: {path} does not say how it was trained (no {METADATA_KEY!r} in its metadata), "
            "so its steps can't be reproduced. Expected a file that `wantrain distill` wrote."
        )
    try:
        told = json.loads(metadata[METADATA_KEY])
        # Fields that a later version adds are not ours to understand.
        known = {name: told[name] for name in Provenance.__dataclass_fields__}
        known["denoising_step_indices_list"] = tuple(known["denoising_step_indices_list"])
        return Provenance(**known)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"LoRA: the {METADATA_KEY!r} metadata of {path} is damaged ({first_line(error)}). "
            "Expected a file that `wantrain distill` wrote; write it again from its checkpoint."
        ) from error


def diffusers_form(
    weights: Mapping[str, torch.Tensor], spec: LoraSpec, provenance: Provenance
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata for `pipe.load_lora_weights`. `weights` carry `train.lora`'s names."""
    adapter = {
        "transformer.r": spec.rank,
        "transformer.lora_alpha": spec.alpha,
        "transformer.target_modules": spec.pattern,
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        METADATA_KEY: provenance.to_json(),
    }
    return {DIFFUSERS_PREFIX + name: tensor for name, tensor in weights.items()}, metadata


def comfyui_form(
    weights: Mapping[str, torch.Tensor], spec: LoraSpec, provenance: Provenance
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors in Wan's original names with `.alpha`, for ComfyUI (diffusers reads them too)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        block, module, matrix = _split(name)
        original = f"{COMFYUI_PREFIX}blocks.{block}.{DIFFUSERS_TO_ORIGINAL[module]}"
        tensors[f"{original}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{original}.alpha"] = torch.tensor(float(spec.alpha))
    return tensors, {"format": "pt", METADATA_KEY: provenance.to_json()}


def _split(name: str) -> tuple[str, str, str]:
    """ "blocks.7.attn1.to_q.lora_A.weight" → ("7", "attn1.to_q", "lora_A")."""
    _, block, *module, matrix, _ = name.split(".")
    return block, ".".join(module), matrix


def lora_path(folder: Path, expert: Expert, form: str) -> Path:
    """Where the final LoRA of an expert lies."""
    return folder / f"lora-{expert}-{form}.safetensors"


def write_loras(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    spec: LoraSpec,
    provenance: Provenance,
    dtype: torch.dtype,
) -> list[Path]:
    """Write the expert's LoRA in every form; the paths written."""
    cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
    paths = []
    for form, build in (("diffusers", diffusers_form), ("comfyui", comfyui_form)):
        tensors, metadata = build(cast, spec, provenance)
        paths.append(lora_path(folder, provenance.expert, form))
        write_bytes(paths[-1], *safetensors_parts(tensors, metadata))
    return paths


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, memoryview]:
    """A safetensors file as (header, tensors), in a fixed order: equal content, equal bytes.

    The library keeps metadata in a hash map, whose order changes from process to process.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, dict(metadata) if metadata else None)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items()))} | {
            name: value for name, value in header.items() if name != "__metadata__"
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay 8-byte aligned
    return struct.pack("<Q", len(text)) + text, memoryview(data)[8 + length :]
