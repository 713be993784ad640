"""Latents as shards hold them → frames, with a VAE that the caller has loaded."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.models.spec import ModelSpec


@torch.inference_mode()
def latents_to_frames(vae: Any, latents: torch.Tensor, spec: ModelSpec) -> npt.NDArray[np.uint8]:
    """Normalised latents (C, T, h, w), any dtype and device → frames (F, H, W, 3) uint8 RGB.

    As diffusers' Wan pipelines decode: raw = latents / (1 / std) + mean in fp32; the VAE in its
    own dtype. `vae`: diffusers' `AutoencoderKLWan` of the model that `spec` is of.
    """
    per_channel = (1, spec.latent_channels, 1, 1, 1)
    mean = torch.tensor(spec.latents_mean, device=vae.device).view(per_channel)
    inverse_std = 1.0 / torch.tensor(spec.latents_std, device=vae.device).view(per_channel)
    raw = latents.unsqueeze(0).to(vae.device).float() / inverse_std + mean
    pixels = vae.decode(raw.to(vae.dtype)).sample[0].float()
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    frames: npt.NDArray[np.uint8] = levels.permute(1, 2, 3, 0).cpu().numpy()
    return frames


def tile_if_full(vae: Any, say: Callable[[str], None]) -> None:
    """Have a VAE decode a clip in overlapping tiles if its memory does not hold it whole.

    `say` is told each time: tiles are blended, so pixels differ slightly from a whole decode.
    Encoding stays whole: shards are equal to the bit. Raises torch.OutOfMemoryError if tiles don't
    fit either.
    """
    whole = vae.decode

    @wraps(whole)
    def decode(*given: Any, **options: Any) -> Any:
        try:
            return whole(*given, **options)
        except torch.OutOfMemoryError:
            pass  # handled below, where the error no longer holds the failed attempt's tensors
        say(f"decode   a clip does not fit the memory of {vae.device}: decoded in tiles")
        vae.clear_cache()
        torch.cuda.empty_cache()
        vae.enable_tiling()
        try:
            return whole(*given, **options)
        finally:
            vae.disable_tiling()

    vae.decode = decode
