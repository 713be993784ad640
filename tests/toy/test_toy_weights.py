"""The committed toy weights: small, safe to load, and a VAE that can see."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from init_toy_model import TOY
from oracle import judge, matching
from render_clips import CAPTIONS
from safetensors import safe_open
from toy_sampling import attend_to_padding, embed_captions, velocity
from train_toy_vae import decode_pixels, encode_moments, held_out, psnr_by_frame, to_pixels
from transformers import AutoTokenizer

FILES = [file for file in TOY.rglob("*") if file.is_file()]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.set_num_threads(1)
    return AutoencoderKLWan.from_pretrained(TOY / "common" / "vae")


def test_small_and_without_pickle() -> None:
    assert sum(file.stat().st_size for file in FILES) < 12_000_000
    assert {file.suffix for file in FILES} == {".json", ".safetensors"}


def test_weights_are_bf16() -> None:
    for file in FILES:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                dtypes = {tensors.get_slice(name).get_dtype() for name in names}
            assert dtypes == {"BF16"}, file


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_model_index_names_two_experts(mode: str) -> None:
    index = json.loads((TOY / mode / "model_index.json").read_text())
    assert index["boundary_ratio"] == {"t2v": 0.875, "i2v": 0.9}[mode]
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    config = WanTransformer3DModel.load_config(TOY / mode / "transformer")
    assert config["in_channels"] == {"t2v": 16, "i2v": 36}[mode]


def test_vae_reconstructs_held_out_renders(vae: AutoencoderKLWan) -> None:
    clips = held_out(6)
    psnr = psnr_by_frame(vae, clips)
    assert psnr.mean() > 30.0
    assert psnr.min() > 29.5  # no frame is left behind, the first and last included


def test_oracle_reads_reconstructions(vae: AutoencoderKLWan) -> None:
    clips = held_out(6)
    pixels = to_pixels(clips)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    seen = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    assert matching([judge(clip) for clip in seen], [CAPTIONS[7 * i % 60] for i in range(6)]) == 1


def test_two_chunks_equal_the_vae(vae: AutoencoderKLWan) -> None:
    pixels = to_pixels(held_out(1))
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
        assert torch.allclose(encode_moments(vae, pixels)[:, :16], mean, atol=1e-4)
        decoded = decode_pixels(vae, mean).clamp(-1, 1)
        assert torch.allclose(decoded, vae.decode(mean).sample, atol=1e-4)


def test_latent_statistics_are_the_measured_ones(vae: AutoencoderKLWan) -> None:
    with torch.no_grad():
        raw = vae.encode(to_pixels(held_out(12))).latent_dist.mode()
    std = np.array(vae.config.latents_std)
    assert (std > 0).all() and not np.allclose(std, 1)
    ratio = raw.std(dim=(0, 2, 3, 4)).numpy() / std
    offset = (raw.mean(dim=(0, 2, 3, 4)).numpy() - np.array(vae.config.latents_mean)) / std
    assert (ratio > 0.7).all() and (ratio < 1.4).all() and (np.abs(offset) < 0.4).all()


def test_tokenizer_takes_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOY / "common" / "tokenizer")
    texts = [CAPTIONS[0], "", "一只猫在跑 😀 naïve", "x" * 3000]
    tokens = tokenizer(texts, padding="max_length", max_length=512, truncation=True)
    ids = np.array(tokens.input_ids)
    lengths = np.array(tokens.attention_mask).sum(axis=1)
    assert ids.shape == (4, 512) and tokenizer.pad_token_id == 0
    assert not (ids == tokenizer.unk_token_id).any()
    assert [row[length - 1] for row, length in zip(ids, lengths, strict=True)] == [1] * 4  # </s>
    assert lengths.tolist()[:2] == [6, 1] and lengths[3] == 512
    assert tokenizer.decode(ids[2], skip_special_tokens=True).strip() == texts[2]


def test_captions_are_told_apart() -> None:
    text = embed_captions(list(CAPTIONS), TOY / "common").flatten(1)
    distance = torch.cdist(text, text) + 1e3 * torch.eye(60)
    assert distance.min() > 0.3 * text.norm(dim=1).mean()


def test_short_text_equals_text_padded_to_512() -> None:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_pretrained(TOY / "t2v" / "transformer")
    text = embed_captions(list(CAPTIONS[:2]), TOY / "common")
    x, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        expected = velocity(transformer, x, sigma, padded, None)
        attend_to_padding(transformer, text.shape[1])
        assert torch.allclose(velocity(transformer, x, sigma, text, None), expected, atol=1e-4)
