"""Wan 2.1 i2v: caches that lack its CLIP embeddings get them, and what they cost is said."""

from pathlib import Path

import pytest
import safetensors.torch

from shared.format.overlays import with_conditions
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep
from tests.preprocess.overlays.test_overlays import members

COND = "cond.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of different shapes."""
    folder = tmp_path_factory.mktemp("families")
    render_clip(folder / "wide.mp4", height=72, width=128, frames=9)
    render_clip(folder / "tall.mp4", height=130, width=70, frames=14, seed=1)
    for name in ("wide", "tall"):
        (folder / f"{name}.txt").write_text(f"a {name} clip")
    return folder


def encode(model: Path, data: Path, output: Path) -> Ran:
    return wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--output", output),
        *("--size", 96, "--video-sample-stride", 1, "--video-sample-n-frames", 9),
        *("--device", "cpu", "--shard-size-mb", 1),
    )


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_a_cache_gets_clip_embeddings(
    mode: str, data: Path, tiny_wan21_i2v: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"tiny_{mode}")
    shards, direct = tmp_path / "shards", tmp_path / "direct"
    assert encode(model, data, shards).code == 0
    assert encode(tiny_wan21_i2v, data, direct).code == 0

    ran = encode(tiny_wan21_i2v, data, shards)
    assert ran.code == 1 and f"mode: shards have '{mode}', expected 'i2v+clip'" in ran.err
    assert "To be redone for the expected values: conditions only" in ran.err
    assert f"To add them: wanprep add-condition --shards {shards}" in ran.err

    before = Cache.open(shards).contents()
    add = ("add-condition", "--shards", shards, "--train-data-dir", data, "--device", "cpu")
    ran = wanprep(*add, "--model", tiny_wan21_i2v)
    assert ran.code == 0, ran.err
    assert Cache.open(shards).contents() == before
    added = members(shards / "conditions", None, COND)
    assert added == members(direct, None, COND) and len(added) == 2
    assert all(len(safetensors.torch.load(data)) == 2 for data in added.values())
    ran = wanprep(*add, "--model", tiny_wan21_i2v)
    assert ran.code == 0 and "2 conditions, 0 of them new" in ran.out


def test_a_cache_with_clip_lacks_nothing(
    data: Path, tiny_i2v: Path, tiny_t2v: Path, tiny_wan21_i2v: Path, tmp_path: Path
) -> None:
    """A14B trains on it, but its samples are not to be mixed with others."""
    shards = tmp_path / "shards"
    assert encode(tiny_wan21_i2v, data, shards).code == 0
    ran = encode(tiny_i2v, data, shards)
    assert ran.code == 1 and "mode: shards have 'i2v+clip', expected 'i2v'" in ran.err
    assert "nothing: i2v models with this VAE train on i2v+clip caches as they are" in ran.err
    ran = wanprep(
        *("add-condition", "--shards", shards, "--train-data-dir", data, "--model", tiny_i2v),
    )
    assert ran.code == 1 and "was encoded for i2v+clip; only a t2v or" in ran.err


def test_conditions_with_clip_serve_a14b_too(
    data: Path, tiny_i2v: Path, tiny_t2v: Path, tiny_wan21_i2v: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    assert encode(tiny_t2v, data, shards).code == 0
    ran = wanprep(
        *("add-condition", "--shards", shards, "--train-data-dir", data, "--device", "cpu"),
        *("--model", tiny_wan21_i2v),
    )
    assert ran.code == 0, ran.err
    index = with_conditions(Cache.open(shards).index, str(tiny_i2v))
    assert index.overlays[COND].index.fingerprint["mode"] == "i2v+clip"
