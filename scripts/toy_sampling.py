"""What training and evaluation of the toy transformers share: text, conditions, sampling.

All latents here are normalised, float32 [B, 16, T, H/8, W/8].
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from transformers import AutoTokenizer, UMT5EncoderModel

TEXT_LENGTH = 512


def timestep_shift(u: torch.Tensor, shift: float) -> torch.Tensor:
    """The noise level σ in 0..1 of a uniform u in 0..1."""
    return shift * u / (1 + (shift - 1) * u)


def step_levels(raw: list[float], shift: float) -> torch.Tensor:
    """The noise levels that a sampler visits, with 0 at the end: float32 [steps + 1]."""
    return timestep_shift(torch.tensor([*raw, 0.0]), shift)


@torch.no_grad()
def embed_captions(captions: list[str], common: Path) -> torch.Tensor:
    """Embeddings as WanPipeline makes them, zero after the true length: [N, tokens + 1, 64].

    They are cut one row after the longest caption, so the last row is always zero.
    `attend_to_padding` makes the transformer treat that row as all the rest up to 512.
    """
    tokenizer = AutoTokenizer.from_pretrained(common / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(common / "text_encoder", dtype=torch.float32)
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    embeddings = encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    embeddings = embeddings * inputs.attention_mask[..., None]
    return torch.nn.functional.pad(embeddings, (0, 0, 0, 1))


def padding_bias(tokens: int) -> torch.Tensor:
    """What to add to the scores of text cut to `tokens`, whose last row stands for all padding:
    float32 [1, 1, 1, tokens]."""
    bias = torch.zeros(1, 1, 1, tokens)
    bias[..., -1] = math.log(TEXT_LENGTH - tokens + 1)
    return bias


class PaddingAwareProcessor(WanAttnProcessor):
    """Cross-attention to short text that equals cross-attention to text of 512 tokens.

    All padding is the same zero row, so n rows weigh as much as one whose score is higher by
    log n. This saves most of the cross-attention's time.
    """

    def __init__(self, tokens: int):
        super().__init__()
        self.bias = padding_bias(tokens)

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_) -> torch.Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias)


def attend_to_padding(transformer: WanTransformer3DModel, tokens: int) -> None:
    """Let the transformer take embeddings [B, tokens, 64] from `embed_captions`."""
    for block in transformer.blocks:
        block.attn2.set_processor(PaddingAwareProcessor(tokens))


def normalise(raw: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
    """Raw latents [B, 16, T, h, w] to latents of mean 0 and deviation 1 per channel."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (raw - mean) * (1 / std)


@torch.no_grad()
def decode_clips(latents: torch.Tensor, vae: AutoencoderKLWan) -> np.ndarray:
    """Normalised latents to uint8 RGB [B, 1+4(T-1), 8h, 8w, 3]."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    clips = [vae.decode(one[None] * std + mean).sample[0] for one in latents]
    pixels = (torch.stack(clips).float() + 1) * 127.5
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()


def with_mask(condition: torch.Tensor) -> torch.Tensor:
    """Put the 4 mask channels (1 in latent frame 0) before a condition: [B, 20, T, h, w]."""
    mask = torch.zeros_like(condition[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, condition], dim=1)


def velocity(
    transformer: WanTransformer3DModel,
    x: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    condition: torch.Tensor | None,
) -> torch.Tensor:
    """Predict noise - x0 at levels σ [B]; `condition` is None or i2v's [B, 20, T, h, w]."""
    if condition is not None:
        x = torch.cat([x, condition], dim=1)
    return transformer(x, 1000 * sigma, text, return_dict=False)[0]


@torch.no_grad()
def sample(
    transformer: WanTransformer3DModel,
    text: torch.Tensor,
    empty: torch.Tensor,
    levels: torch.Tensor,
    guidance: float,
    latent_shape: tuple[int, int, int],
    condition: torch.Tensor | None = None,
    renoise: bool = False,
    seed: int = 0,
) -> torch.Tensor:
    """Draw latents for text [B, tokens, 64] from pure noise, with the levels of `step_levels`.

    `guidance` 1 means the conditional prediction alone. With `renoise` every step goes to x0 and
    back up with fresh noise (as few-step models are trained), else along the velocity (Euler).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(text), transformer.config.out_channels, *latent_shape)
    x = torch.randn(shape, generator=generator)
    for now, after in itertools.pairwise(levels):
        sigma = now.expand(len(text))
        v = velocity(transformer, x, sigma, text, condition)
        if guidance != 1:
            without = velocity(transformer, x, sigma, empty.expand_as(text), condition)
            v = without + guidance * (v - without)
        if renoise:
            x0 = x - now * v
            x = (1 - after) * x0 + after * torch.randn(shape, generator=generator)
        else:
            x = x + (after - now) * v
    return x
