"""Which caches and models belong together."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from preprocess.encode.config import EncodeConfig
from preprocess.encode.fingerprint import encode_fingerprint
from shared.errors import UserError
from shared.format.fingerprint import (
    as_in_cache,
    differences,
    flatten,
    model_fields,
    refuse_differences,
)
from shared.io.hashing import FileHasher
from shared.models.digest import component_digest
from shared.models.spec import read_model_spec
from shared.models.toy_model import toy_folder


@pytest.fixture
def hasher(tmp_path: Path) -> FileHasher:
    return FileHasher(tmp_path / "memo")


def test_a_component_is_known_by_its_content(
    tiny_t2v: Path, tmp_path: Path, hasher: FileHasher
) -> None:
    original = component_digest(tiny_t2v, "vae", hasher)
    copy = tmp_path / "another-name" / "vae"
    shutil.copytree(tiny_t2v / "vae", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_diffusers_version": "9.9"}))
    assert component_digest(copy.parent, "vae", hasher) == original

    (copy / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 16}))
    assert component_digest(copy.parent, "vae", hasher) != original
    (copy / "config.json").write_text(json.dumps(config))
    assert component_digest(copy.parent, "vae", hasher) == original

    file = copy / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights[next(iter(weights))].view(-1)[0] += 1
    safetensors.torch.save_file(weights, file)
    assert component_digest(copy.parent, "vae", hasher) != original
    file.unlink()
    assert component_digest(copy.parent, "vae", hasher) is None


def test_absent_weights_are_unknown_not_different(
    tiny_t2v: Path, tmp_path: Path, hasher: FileHasher
) -> None:
    """A machine that trains need not hold the text encoder."""
    model = tmp_path / "model"
    shutil.copytree(tiny_t2v, model)
    shutil.rmtree(model / "text_encoder")
    cache = model_fields(read_model_spec(tiny_t2v), hasher)
    here = model_fields(read_model_spec(model), hasher)
    assert here["text"]["encoder"] is None
    assert differences(cache, here) == []


def test_a_difference_is_refused_with_both_values_and_the_cure() -> None:
    found = {"latents": {"vae": "aa", "channels": 16}, "seed": 1}
    expected = {"latents": {"vae": "bb", "channels": 16}, "seed": 2}
    everything = "everything: latents, conditions and text"
    with pytest.raises(UserError) as caught:
        refuse_differences(found, expected, what="what", cure="cure")
    assert str(caught.value).splitlines() == [
        "what:",
        "  latents.vae: shards have 'aa', expected 'bb'",
        "  seed: shards have 1, expected 2",
        f"To be redone for the expected values: {everything}.",
        "cure",
    ]
    refuse_differences(found, found, what="", cure="")
    # A field that the shards lack altogether differs as well.
    assert differences({}, {"seed": 2}) == [("seed", None, 2)]


TEXT = "text embeddings only; the latents would be the same"
PIXELS = "latents and conditions; the text embeddings would be the same"
ALL = "everything: latents, conditions and text"
REDO = {"format": ALL, "latents": PIXELS, "media": PIXELS, "text": TEXT}


def test_every_field_says_what_it_would_cost(tiny_i2v: Path, tmp_path: Path) -> None:
    """All fields of a real fingerprint, each changed alone."""
    config = EncodeConfig(
        model=str(tiny_i2v),
        train_data_dir=tmp_path,
        output=tmp_path,
        size=64,
        video_sample_stride=1,
        video_sample_n_frames=5,
        negative_prompt="",
        dtype="fp32",
    )
    whole = encode_fingerprint(config, read_model_spec(tiny_i2v), FileHasher(tmp_path / "memo"))
    fields = flatten(whole)
    assert len(fields) > 20
    for field, value in fields.items():
        if field == "mode":
            continue
        group, _, name = field.partition(".")
        changed = {**whole, group: {**whole[group], name: "other"} if name else "other"}
        with pytest.raises(UserError) as caught:
            refuse_differences(changed, whole, what="what", cure="cure")
        assert str(caught.value).splitlines() == [
            "what:",
            f"  {field}: shards have 'other', expected {value!r}",
            f"To be redone for the expected values: {REDO[group]}.",
            "cure",
        ]


@pytest.mark.parametrize(
    ("found", "expected", "redo"),
    [
        ({"mode": "t2v"}, {"mode": "i2v"}, "conditions only; latents and text embeddings"),
        ({"mode": "i2v"}, {"mode": "t2v"}, "nothing: t2v models"),
        ({"mode": "t2v"}, {"mode": "ti2v"}, "nothing: ti2v models"),
        ({"mode": "i2v"}, {"mode": "i2v+clip"}, "conditions only; latents and text embeddings"),
        ({"mode": "i2v+clip"}, {"mode": "i2v"}, "nothing: i2v models"),
        ({"image": {"dim": 1}}, {"image": {"dim": 2}}, "conditions only; latents and text"),
        (
            {"text": {"dim": 1}, "media": {"seed": 1}},
            {"text": {"dim": 2}, "media": {"seed": 2}},
            ALL,
        ),
        (
            {"mode": "t2v", "text": {"dim": 1}},
            {"mode": "i2v", "text": {"dim": 2}},
            "text embeddings only, and conditions; the latents",
        ),
    ],
)
def test_changes_of_the_mode_and_of_several_fields(
    found: dict[str, object], expected: dict[str, object], redo: str
) -> None:
    with pytest.raises(UserError) as caught:
        refuse_differences(found, expected, what="what", cure="cure")
    assert f"To be redone for the expected values: {redo}" in str(caught.value)


def test_a_cache_keeps_the_digest_that_its_components_once_had(
    tmp_path: Path, hasher: FileHasher
) -> None:
    """Golden: made at d0f92fe, which digested all that lay in a folder. Caches have these."""
    model = tmp_path / "model"
    shutil.copytree(toy_folder("toy"), model)
    (model / "text_encoder" / "pytorch_model.bin").write_bytes(b"weights once more")
    variant = {"left.out": torch.arange(6.0).reshape(2, 3)}
    safetensors.torch.save_file(variant, model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    old = {
        "text": {"encoder": "35313484cb672b0298b5373a278be92ac78d5d999be9a1625e11d9c958d7e885"},
        "latents": {"vae": "36db0b4b719101df182184c8fe1baada6fcfd78c8348898de50260bb3982eab0"},
    }
    fields = model_fields(read_model_spec(model), hasher)
    assert len(differences(old, {"text": fields["text"], "latents": fields["latents"]})) > 0
    same = as_in_cache(fields, old, model, hasher)
    assert same["text"]["encoder"] == old["text"]["encoder"]
    assert same["latents"]["vae"] == old["latents"]["vae"]
    other = {"text": {"encoder": "0" * 64}}
    assert as_in_cache(fields, other, model, hasher) == fields
