"""A model's facts, read from its config files."""

import json
import os
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.models.spec import read_model_spec, resolve_model


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
    transformer: dict[str, object] = {"_class_name": "WanTransformer3DModel"}
    transformer |= {"in_channels": in_channels, "patch_size": [1, 2, 2], "text_dim": 4096}
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


# The config files of the published repositories, as far as they are read.
A14B = {
    "dim": 5120, "eps": 1e-6, "ffn_dim": 13824, "freq_dim": 256, "in_dim": 36, "num_heads": 40,
    "num_layers": 40, "out_dim": 16, "model_type": "i2v", "_class_name": "WanModel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "fields", "expected"),
    [
        (2, {}, ("i2v", 0.9, 16, (4, 8, 8), 16, None)),
        (2, {"model_type": "t2v", "in_dim": 16}, ("t2v", 0.875, 16, (4, 8, 8), 16, None)),
        (1, {"model_type": "t2v", "in_dim": 16}, ("t2v", None, 16, (4, 8, 8), 16, None)),
        (1, {}, ("i2v", None, 16, (4, 8, 8), 16, 1280)),  # Wan 2.1
        (
            1,
            {"model_type": "ti2v", "in_dim": 48, "out_dim": 48},
            ("ti2v", None, 48, (4, 16, 16), 32, None),
        ),
    ],
)
def test_the_families_in_the_original_layout(
    experts: int, fields: dict[str, object], expected: tuple[object, ...], tmp_path: Path
) -> None:
    """From config.json alone, before any weight is on the machine."""
    for name in ("high_noise_model", "low_noise_model") if experts == 2 else (".",):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(A14B | fields))
    spec = read_model_spec(tmp_path)
    assert expected == (
        spec.mode, spec.boundary, spec.latent_channels, spec.stride, spec.side_multiple,
        spec.image_dim,
    )  # fmt: skip
    assert (spec.text_dim, spec.patch, spec.two_experts) == (4096, (1, 2, 2), experts == 2)
    assert len(spec.latents_mean) == len(spec.latents_std) == spec.latent_channels


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "plain", "a/b/c"])
def test_a_missing_folder_names_the_flag(name: str) -> None:
    with pytest.raises(UserError, match="--pretrained-model-name-or-path"):
        resolve_model(name, ("vae",))


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """safetensors can't open a file below it, however whole it is."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/model\xff"))
    folder.mkdir()
    with pytest.raises(UserError, match=r"has a name that is not UTF-8 text.* Rename the folder"):
        resolve_model(str(folder), ())


def test_a_model_of_no_known_family_is_refused(tmp_path: Path) -> None:
    folder = configs(tmp_path, index={}, in_channels=16, spatial=8)
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace("WanTransformer3DModel", "LTXVideoTransformer3DModel"))
    expected = r"is of a LTXVideoTransformer3DModel; expected a WanTransformer3DModel\. Choose"
    with pytest.raises(UserError, match=expected):
        read_model_spec(folder)
