"""The published configs make the published models."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from shared.models.spec import read_model_spec
from shared.models.wan import PUBLISHED, published_model, write_configs

# Parameters of one transformer, rounded.
WEIGHTS = {
    "wan2.1-t2v-1.3b": 1.42e9,
    "wan2.1-t2v-14b": 14.3e9,
    "wan2.1-i2v-14b-480p": 16.4e9,
    "wan2.1-i2v-14b-720p": 16.4e9,
    "wan2.1-flf2v-14b-720p": 16.4e9,
    "wan2.2-t2v-a14b": 14.3e9,
    "wan2.2-i2v-a14b": 14.3e9,
    "wan2.2-ti2v-5b": 5.0e9,
}
# mode, boundary, latent channels, spatial stride, training shift (design brief, sections 2 and 5)
FACTS = {
    "wan2.1-t2v-1.3b": ("t2v", None, 16, 8, 5.0),
    "wan2.1-t2v-14b": ("t2v", None, 16, 8, 5.0),
    "wan2.1-i2v-14b-480p": ("i2v", None, 16, 8, 5.0),
    "wan2.1-i2v-14b-720p": ("i2v", None, 16, 8, 5.0),
    "wan2.1-flf2v-14b-720p": ("flf2v", None, 16, 8, 16.0),
    "wan2.2-t2v-a14b": ("t2v", 0.875, 16, 8, 12.0),
    "wan2.2-i2v-a14b": ("i2v", 0.9, 16, 8, 5.0),
    "wan2.2-ti2v-5b": ("ti2v", None, 48, 16, 5.0),
}


def closed_form(
    width: int, inner: int, layers: int, channels: tuple[int, int], *, clip: bool, given: int
) -> int:
    """Weights and biases of Wan's transformer as its paper and code lay it out."""

    def linear(into: int, out: int) -> int:
        return into * out + out

    attention = 4 * linear(width, width) + 2 * width
    image = 2 * linear(width, width) + width if clip else 0
    feed_forward = linear(width, inner) + linear(inner, width)
    block = 2 * attention + image + feed_forward + 2 * width + 6 * width
    ends = linear(4 * channels[0], width) + linear(width, 4 * channels[1]) + 2 * width
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    text = linear(4096, width) + linear(width, width)
    clip_embedder = linear(1280, 1280) + linear(1280, width) + 2 * 1280 + 2 * width if clip else 0
    positions = 257 * 1280 * given if given > 1 else 0  # of CLIP's embeddings
    return layers * block + ends + time + text + clip_embedder + positions


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_size(name: str, tmp_path: Path) -> None:
    write_configs(PUBLISHED[name], tmp_path)
    spec = read_model_spec(tmp_path)
    found = (spec.mode, spec.boundary, spec.latent_channels, spec.stride[1], spec.flow_shift)
    assert found == FACTS[name]
    width, inner, layers = {"1.3b": (1536, 8960, 30), "5b": (3072, 14336, 30)}.get(
        name.rsplit("-", 1)[1], (5120, 13824, 40)
    )
    channels = (36 if spec.given_frames else spec.latent_channels, spec.latent_channels)
    wanted = closed_form(
        width,
        inner,
        layers,
        channels,
        clip=spec.image_dim is not None,
        given=len(spec.given_frames),
    )
    assert wanted == pytest.approx(WEIGHTS[name], rel=5e-3)
    for component in spec.expert_folders:
        config = WanTransformer3DModel.load_config(tmp_path, subfolder=component)
        with torch.device("meta"):
            transformer = WanTransformer3DModel.from_config(config)
        assert sum(p.numel() for p in transformer.parameters()) == wanted
        assert config.keys() <= transformer.config.keys() | {"_class_name"}


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
def test_diffusers_reads_the_other_configs(name: str, tmp_path: Path) -> None:
    write_configs(PUBLISHED[name], tmp_path)
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(tmp_path / "vae"))
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == vae.config.z_dim
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.flow_shift == PUBLISHED[name].flow_shift


def test_a_model_has_three_names() -> None:
    model = PUBLISHED["wan2.2-i2v-a14b"]
    assert model.hub_id == "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    for name in ("wan2.2-i2v-a14b", model.hub_id, "Wan-AI/Wan2.2-I2V-A14B"):
        assert published_model(name) is model
    # Of this one the hub's name has a small d.
    flf2v = published_model("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers")
    assert flf2v is PUBLISHED["wan2.1-flf2v-14b-720p"]
    assert published_model("Wan-AI/Wan2.1-VACE-14B-Diffusers") is None
