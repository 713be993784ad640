"""Which caches and models belong together."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from shared.errors import UserError
from shared.fingerprint import component_digest, differences, model_fields, refuse_differences
from shared.hashing import FileHasher
from shared.model_spec import read_model_spec


@pytest.fixture
def hasher(tmp_path: Path) -> FileHasher:
    return FileHasher(tmp_path / "memo")


def test_a_component_is_known_by_its_content(
    tiny_t2v: Path, tmp_path: Path, hasher: FileHasher
) -> None:
    original = component_digest(tiny_t2v / "vae", hasher)
    copy = tmp_path / "another-name"
    shutil.copytree(tiny_t2v / "vae", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_diffusers_version": "9.9"}))
    assert component_digest(copy, hasher) == original

    (copy / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 16}))
    assert component_digest(copy, hasher) != original
    (copy / "config.json").write_text(json.dumps(config))
    assert component_digest(copy, hasher) == original

    file = copy / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights[next(iter(weights))].view(-1)[0] += 1
    safetensors.torch.save_file(weights, file)
    assert component_digest(copy, hasher) != original
    file.unlink()
    assert component_digest(copy, hasher) is None


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
    with pytest.raises(UserError) as caught:
        refuse_differences(found, expected, what="what", cure="cure")
    assert str(caught.value).splitlines() == [
        "what:",
        "  latents.vae: shards have 'aa', expected 'bb'",
        "  seed: shards have 1, expected 2",
        "cure",
    ]
    refuse_differences(found, found, what="", cure="")
    # A field that the shards lack altogether differs as well.
    assert differences({}, {"seed": 2}) == [("seed", None, 2)]
