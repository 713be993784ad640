"""The harder world: the oracle reads speeds, and its toys have two experts that need CFG."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from init_toy_model import TOY
from safetensors.torch import load_file
from speed_world import CAPTIONS, SPEEDS, Seen, judge, parse_caption, render_clip, travel_of
from toy_sampling import (
    attend_to_padding,
    decode_clips,
    embed_captions,
    normalise,
    velocity,
    with_mask,
)
from train_experts import BOUNDARIES, noisy_captions
from train_toy_vae import HELD_OUT_SEED, encode_moments, to_pixels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from toy_students import deviations

from shared.models.toy_model import toy_folder

TOLD = [parse_caption(caption) for caption in CAPTIONS]


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.stack([render_clip(caption, 40 + i) for i, caption in enumerate(CAPTIONS)])


def test_a_hundred_and_eight_distinct_captions() -> None:
    assert len(set(CAPTIONS)) == len({*TOLD}) == 108
    assert {told.speed for told in TOLD} == {*SPEEDS, None}
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption("a red circle moving left")


def test_the_oracle_is_right_on_renders_and_at_chance_on_others(clips: np.ndarray) -> None:
    seen = [judge(clip) for clip in clips]
    assert np.mean([one == other for one, other in zip(seen, TOLD, strict=True)]) >= 0.98
    order = np.random.default_rng(0).permutation(len(TOLD))
    assert np.mean([seen[i] == TOLD[j] for i, j in enumerate(order)]) <= 0.05


def test_the_oracle_reads_what_the_vae_gives_back(clips: np.ndarray) -> None:
    vae = AutoencoderKLWan.from_pretrained(TOY / "common" / "vae")
    with torch.no_grad():
        latents = normalise(encode_moments(vae, to_pixels(clips[::9]))[:, :16], vae)
    seen = [judge(clip) for clip in decode_clips(latents, vae)]
    assert np.mean([one == other for one, other in zip(seen, TOLD[::9], strict=True)]) >= 0.9


def test_half_a_speed_is_seen() -> None:
    """A fast clip that goes half as far is not fast any more; one that stops stands still."""
    caption = "a red circle moving left fast"
    clip = render_clip(caption, 3)
    assert judge(clip) == Seen("red", "circle", "moving left", "fast")
    half = clip[np.arange(17) // 2]
    assert judge(half).speed == "slowly"
    assert travel_of(half) == pytest.approx(travel_of(clip) / 2, rel=0.1)
    assert judge(clip[np.zeros(17, int)]).motion == "standing still"


@pytest.mark.parametrize("size", [(96, 80), (64, 112)])
def test_other_sizes(size: tuple[int, int]) -> None:
    for caption in CAPTIONS[::13]:
        assert judge(render_clip(caption, 1, 17, *size)) == parse_caption(caption)


def test_deviations_are_those_of_a_mixture() -> None:
    """Gaussians of known spread around means of known spread, unequal numbers of clips."""
    generator = torch.Generator().manual_seed(0)
    names = [f"caption {i}" for i in range(300) for _ in range(2 + i % 3)]
    means = 3.0 * torch.randn(300, 40, generator=generator)
    clips = means[[int(name[8:]) for name in names]]
    clips = clips + 2.0 * torch.randn(clips.shape, generator=generator)
    found = deviations(clips, names)
    assert found["within"] == pytest.approx(2, rel=0.02)
    assert found["between"] == pytest.approx(3, rel=0.02)
    assert found["contrast"] == pytest.approx(13**0.5, rel=0.02)


def test_captions_lie_as_often_as_they_should() -> None:
    """Each attribute is right with probability 0.65 + 0.35 / its number of values."""
    rng = np.random.default_rng(5)
    told = np.arange(20_000) % len(CAPTIONS)
    heard = [TOLD[i] for i in noisy_captions(told, rng)]
    right = np.mean([TOLD[i].colour == one.colour for i, one in zip(told, heard, strict=True)])
    assert right == pytest.approx(0.65 + 0.35 / 4, abs=0.01)


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_an_i2v_expert_is_the_t2v_one_with_its_lora(expert: str) -> None:
    """As peft applies it, on inputs whose image counts; 16 of 36 channels are those of t2v."""
    generator = torch.Generator().manual_seed(0)
    own = load_file(TOY / "experts-i2v" / expert / "difference.safetensors")
    lora = {name: tensor for name, tensor in own.items() if "lora_" in name}
    whole = {name: tensor for name, tensor in own.items() if "lora_" not in name}
    weights = load_file(TOY / "experts-t2v" / expert / "diffusion_pytorch_model.safetensors")
    assert {*whole} == {"patch_embedding.weight", "patch_embedding.bias"} and len(lora) == 80
    config = WanTransformer3DModel.load_config(TOY / "experts-i2v" / expert)
    reference = WanTransformer3DModel.from_config(config)
    reference.load_state_dict(weights | whole)
    reference.load_lora_adapter(lora, prefix=None)
    x = torch.randn(2, 36, 3, 8, 10, generator=generator)
    text = torch.randn(2, 512, 64, generator=generator)
    timestep = torch.tensor([950.0, 300.0])
    merged = WanTransformer3DModel.from_pretrained(toy_folder("toy-experts-i2v") / expert)
    with torch.no_grad():
        found, expected = (model(x, timestep, text).sample for model in (merged, reference))
        reference.disable_lora()
        without = reference(x, timestep, text).sample
    assert (found - expected).norm() < 0.01 * expected.norm()  # rounded to bf16
    assert (without - expected).norm() > 10 * (found - expected).norm()


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_experts_are_good_only_at_their_own_levels(mode: str, clips: np.ndarray) -> None:
    """Flow-matching loss of each expert on held-out renders, at its levels and the other's."""
    torch.set_num_threads(1)
    folder = toy_folder({"t2v": "toy-experts", "i2v": "toy-experts-i2v"}[mode])
    text = embed_captions([*CAPTIONS, ""], TOY / "common")
    vae = AutoencoderKLWan.from_pretrained(TOY / "common" / "vae")
    picks = torch.arange(0, len(CAPTIONS), 3)
    held = np.stack([render_clip(CAPTIONS[i], HELD_OUT_SEED + i) for i in picks.tolist()])
    pixels = to_pixels(held)
    first = pixels.clone()
    first[:, :, 1:] = 0
    with torch.no_grad():
        x0, frame = (normalise(encode_moments(vae, p)[:, :16], vae) for p in (pixels, first))
    condition = with_mask(frame) if mode == "i2v" else None
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))

    def loss(expert: str, sigma: float) -> float:
        model = WanTransformer3DModel.from_pretrained(folder / expert)
        attend_to_padding(model, text.shape[1])
        levels = torch.full((len(x0),), sigma)
        with torch.no_grad():
            noisy = (1 - sigma) * x0 + sigma * noise
            v = velocity(model, noisy, levels, text[picks], condition)
        return float((v - (noise - x0)).square().mean())

    for sigma in (0.3, 0.6):
        assert loss("transformer", sigma) > 1.1 * loss("transformer_2", sigma)
    high = (BOUNDARIES[mode] + 1) / 2
    assert loss("transformer_2", high) > 1.02 * loss("transformer", high)
