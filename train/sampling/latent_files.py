"""Latents of sampled clips as files: what validation leaves and `wantrain decode` reads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import UserError, first_line
from train.saving.safetensors_io import safetensors_parts

FORMAT = "wandistill latents 1"


@dataclass(frozen=True, kw_only=True)
class LatentClip:
    """One clip in latents."""

    latents: torch.Tensor
    """(C, T, h, w), normalised as in the shards, on the CPU."""
    label: str
    """Its prompt."""
    vae: str
    """Digest of the VAE that they are for."""


def latent_bytes(clip: LatentClip) -> bytes:
    """safetensors with the tensor `latents`; equal clips are equal bytes."""
    metadata = {"format": FORMAT, "prompt": clip.label, "vae": clip.vae}
    return b"".join(safetensors_parts({"latents": clip.latents}, metadata))


def read_latents(path: Path) -> LatentClip:
    """Raises UserError for a file that holds anything else."""
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("format") != FORMAT or list(stream.keys()) != ["latents"]:
                raise ValueError(f"it holds {', '.join(stream.keys()) or 'nothing'}")
            latents = stream.get_tensor("latents")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"--latents: cannot use {path} ({first_line(error)}). Expected a file that validation "
            "of `wantrain` left: output_dir/validation/step-N/*.safetensors."
        ) from error
    if latents.ndim != 4 or not bool(torch.isfinite(latents).all()):
        raise UserError(
            f"--latents: {path} holds latents of shape {tuple(latents.shape)}, or not finite ones; "
            "expected (channels, frames, height, width). Sample again."
        )
    return LatentClip(
        latents=latents, label=metadata.get("prompt", ""), vae=metadata.get("vae", "")
    )
