"""Latents as shards hold them → frames, with a VAE that the caller has loaded."""

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
