"""Wan 2.1 i2v: CLIP's embedding of the first frame goes into every pass of every role."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file

from preprocess.cli.app import app as wanprep
from shared.errors import UserError
from shared.format.cache import open_cache
from shared.io.store import Store
from tests.models import IMAGE_DIM
from tests.train.conftest import encode
from tests.train.data.test_batches import _dataset, _plain
from tests.train.methods.test_dmd_float64 import UPDATE
from tests.train.model.test_roles import NEGATIVE, build_batch, build_recipe, build_roles
from tests.train.test_distill import distill, final_bytes
from train.cli.app import app as wantrain
from train.methods.dmd import generator_step


@pytest.fixture(scope="module")
def shards(dataset: Path, tiny_wan21_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(dataset, tiny_wan21_i2v, tmp_path_factory.mktemp("wan21") / "shards")


def test_the_embedding_is_looked_at(tiny_wan21_i2v: Path) -> None:
    """With the right result: see test_dmd_float64."""
    image = torch.randn(2, 10, IMAGE_DIM, generator=torch.Generator().manual_seed(8))
    batch, recipe = replace(build_batch("i2v", update=UPDATE), image=image), build_recipe("i2v")
    roles = build_roles(tiny_wan21_i2v, expert="full")
    loss = generator_step(roles, recipe, batch, NEGATIVE).loss
    blind = generator_step(roles, recipe, replace(batch, image=0 * image), NEGATIVE).loss
    assert abs(blind.item() / loss.item() - 1) > 1e-3


def test_batches_bring_what_is_cached(shards: Path, tiny_wan21_i2v: Path) -> None:
    plain, images = _plain(shards), 0
    for batch in _dataset(shards, tiny_wan21_i2v).ahead(start=0, stop=4, workers=0):
        assert batch.image is not None
        for row, key in enumerate(batch.keys):
            cached = load(plain[key]["cond.safetensors"])["clip"]
            assert torch.equal(batch.image[row], cached)
            is_image = b'"type": "image"' in plain[key]["json"]
            assert cached.any() != is_image  # an image's would be its own target
            images += is_image
    assert images


def test_distilled_resumed_and_sampled(shards: Path, tiny_wan21_i2v: Path, tmp_path: Path) -> None:
    out = distill(tiny_wan21_i2v, shards, tmp_path / "out", "--max-train-steps", "2")
    again = distill(tiny_wan21_i2v, shards, tmp_path / "again", "--max-train-steps", "1")
    distill(
        tiny_wan21_i2v, shards, again, "--max-train-steps", "2",
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert final_bytes(again) == final_bytes(out)

    picture = np.random.default_rng(0).integers(0, 255, (70, 64, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    wantrain(
        [
            "sample", "--model", str(tiny_wan21_i2v), "--prompt", "waves", "--device", "cpu",
            "--lora", str(out / "lora-full-diffusers.safetensors"), "--height", "64", "--width",
            "96", "--num-frames", "9", "--dtype", "fp32", "--output", str(tmp_path / "clips"),
            "--image", str(tmp_path / "first.png"),
        ],
        standalone_mode=False,
    )  # fmt: skip
    assert (tmp_path / "clips" / "student-000.mp4").exists()


@pytest.mark.parametrize("first", ["t2v", "i2v"])
def test_embeddings_that_were_added_later(
    first: str,
    dataset: Path,
    shards: Path,
    tiny_wan21_i2v: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Refused until they are there, then the same LoRA as from a cache encoded for the model."""
    own = encode(dataset, request.getfixturevalue(f"tiny_{first}"), tmp_path / "shards")
    lacks = "without the conditions" if first == "t2v" else "without the CLIP embeddings"
    with pytest.raises(UserError, match=f"{lacks}.*wanprep add-condition"):
        distill(tiny_wan21_i2v, own, tmp_path / "refused", "--max-train-steps", "1")
    wanprep(
        [
            "add-condition", "--shards", str(own), "--model", str(tiny_wan21_i2v),
            "--train-data-dir", str(dataset), "--device", "cpu",
        ],
        standalone_mode=False,
    )  # fmt: skip
    assert open_cache(Store(own)).fingerprint["mode"] == first
    later = distill(tiny_wan21_i2v, own, tmp_path / "later", "--max-train-steps", "1")
    direct = distill(tiny_wan21_i2v, shards, tmp_path / "direct", "--max-train-steps", "1")
    name = "lora-full-diffusers.safetensors"  # its metadata names the shards, which differ
    tensors = load_file(direct / name)
    assert all(torch.equal(found, tensors[key]) for key, found in load_file(later / name).items())


def test_conditions_of_a_model_without_clip_are_to_be_made_anew(
    dataset: Path, tiny_t2v: Path, tiny_i2v: Path, tiny_wan21_i2v: Path, tmp_path: Path
) -> None:
    own = encode(dataset, tiny_t2v, tmp_path / "shards")
    wanprep(
        [
            "add-condition", "--shards", str(own), "--model", str(tiny_i2v),
            "--train-data-dir", str(dataset), "--device", "cpu",
        ],
        standalone_mode=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=f"Delete {own}/conditions and .*wanprep add-condition"):
        distill(tiny_wan21_i2v, own, tmp_path / "refused", "--max-train-steps", "1")


def test_an_image_encoder_that_differs_is_refused(
    shards: Path, tiny_wan21_i2v: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_wan21_i2v, other)
    weights = other / "image_encoder" / "model.safetensors"
    changed = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"image\.encoder: shards have '\w+', expected '\w+'"):
        distill(other, shards, tmp_path / "out", "--max-train-steps", "1")
