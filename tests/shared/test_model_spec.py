"""A model's facts, read from its config files."""

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.model_spec import read_model_spec, resolve_model


def test_the_tiny_models(tiny_t2v: Path, tiny_i2v: Path) -> None:
    t2v, i2v = read_model_spec(tiny_t2v), read_model_spec(tiny_i2v)
    assert (t2v.mode, t2v.boundary, t2v.flow_shift) == ("t2v", 0.875, 12.0)
    assert (i2v.mode, i2v.boundary, i2v.flow_shift) == ("i2v", 0.9, 5.0)
    for spec in (t2v, i2v):
        assert (spec.stride, spec.patch, spec.side_multiple) == ((4, 8, 8), (1, 2, 2), 16)
        assert (spec.latent_channels, spec.text_dim, spec.image_dim) == (16, 32, None)
        assert spec.expert_folders == ("transformer", "transformer_2")
        assert len(spec.latents_mean) == len(spec.latents_std) == 16
        assert set(spec.latents_std) != {1.0}


def test_the_toys_are_whole() -> None:
    for name, mode in (("toy", "t2v"), ("toy-i2v", "i2v")):
        folder = resolve_model(name, ("vae",))
        spec = read_model_spec(folder)
        assert spec.mode == mode and spec.two_experts and spec.side_multiple == 16
        assert resolve_model(name, ("vae",)) == folder  # built once


def configs(folder: Path, *, index: dict[str, object], in_channels: int, spatial: int) -> Path:
    """The config files of a published model, as far as they are read."""
    vae = {
        "z_dim": 48 if spatial == 16 else 16,
        "latents_mean": [0.1],
        "latents_std": [2.0],
        "scale_factor_spatial": spatial,
        "scale_factor_temporal": 4,
    }
    transformer = {"in_channels": in_channels, "patch_size": [1, 2, 2], "text_dim": 4096}
    for name, value in (
        ("model_index.json", index),
        ("vae/config.json", vae),
        ("transformer/config.json", transformer),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def test_the_families(tmp_path: Path) -> None:
    two = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    a14b = read_model_spec(configs(tmp_path / "a", index=two, in_channels=36, spatial=8))
    assert (a14b.mode, a14b.two_experts, a14b.side_multiple) == ("i2v", True, 16)
    one = {"transformer_2": [None, None], "boundary_ratio": None}
    wan21 = read_model_spec(configs(tmp_path / "b", index=one, in_channels=16, spatial=8))
    assert (wan21.mode, wan21.expert_folders) == ("t2v", ("transformer",))
    small = {**one, "expand_timesteps": True}
    ti2v = read_model_spec(configs(tmp_path / "c", index=small, in_channels=48, spatial=16))
    assert (ti2v.mode, ti2v.side_multiple, ti2v.stride) == ("ti2v", 32, (4, 16, 16))


@pytest.mark.parametrize(
    ("index", "in_channels", "message"),
    [
        ({"boundary_ratio": 0.9}, 16, "two experts need a boundary"),
        ({"transformer_2": ["a", "b"]}, 16, "two experts need a boundary"),
        ({}, 17, "in_channels=17"),
        ({"expand_timesteps": True}, 36, r"expand_timesteps \(ti2v\) expected the VAE's 16"),
    ],
)
def test_contradictions_are_refused(
    index: dict[str, object], in_channels: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_model_spec(configs(tmp_path, index=index, in_channels=in_channels, spatial=8))


def test_an_original_layout_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").touch()
    with pytest.raises(UserError, match="looks like Wan's original layout"):
        read_model_spec(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "plain", "a/b/c"])
def test_a_missing_folder_names_the_flag(name: str) -> None:
    with pytest.raises(UserError, match="--pretrained-model-name-or-path"):
        resolve_model(name, ("vae",))
