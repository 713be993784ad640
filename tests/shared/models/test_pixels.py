"""Decoding on a card that holds no whole clip: in tiles, said, and without a trace in encoding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from preprocess.encode.encoders import LatentEncoder
from shared.models.pixels import tile_if_full
from shared.models.spec import read_model_spec
from tests.models import tiny_ti2v_vae, tiny_vae


def limited(vae: AutoencoderKLWan, side: int) -> None:
    """Have the decoder run out of memory above `side` latents, as a small card's would."""
    whole = vae.decoder.forward

    def forward(latents: torch.Tensor, *given: Any, **options: Any) -> Any:
        if max(latents.shape[-2:]) > side:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(latents, *given, **options)

    vae.decoder.forward = forward


@pytest.mark.parametrize(
    ("make", "channels", "tile"), [(tiny_vae, 16, 32), (tiny_ti2v_vae, 48, 16)]
)
@torch.inference_mode()
def test_what_does_not_fit_is_decoded_in_tiles(make: Any, channels: int, tile: int) -> None:
    torch.manual_seed(1)
    vae, said = make(), []
    tile_if_full(vae, said.append)
    latents = torch.randn(1, channels, 2, tile, tile + 4)
    whole = vae.decode(latents).sample
    assert not said
    limited(vae, tile)
    tiled = vae.decode(latents, return_dict=False)[0]
    assert tiled.shape == whole.shape
    assert len(said) == 1 and "does not fit the memory of cpu: decoded in tiles" in said[0]
    assert not vae.use_tiling
    vae.enable_tiling()
    assert torch.equal(tiled, AutoencoderKLWan.decode(vae, latents).sample)
    vae.disable_tiling()
    limited(vae, tile // 2)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(latents)
    assert not vae.use_tiling


def test_encoding_is_never_tiled(tiny_t2v: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a decode in tiles, nor where it does not fit: the latents would be others."""
    encoder = LatentEncoder(read_model_spec(tiny_t2v), dtype=torch.float32, device="cpu")
    frames = np.random.default_rng(1).integers(0, 256, (5, 32, 288, 3)).astype(np.uint8)
    before = encoder.latents(frames)
    said: list[str] = []
    encoder.tile_if_full(said.append)
    limited(encoder._vae, 32)
    assert encoder.frames(before).shape == frames.shape and said
    assert torch.equal(encoder.latents(frames), before)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoder._vae.encoder, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.latents(frames)
    assert len(said) == 1
