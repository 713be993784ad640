"""The latent → RGB map: least squares as numpy has it, through encode, rerun and rebuild."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from preprocess.media.decode import fit
from preprocess.media.reader import read_frames
from shared.format.buckets import Bucket
from shared.format.cache import CacheIndex, Sidecar, committed_shards
from shared.format.latent_rgb import (
    ColourFit,
    ColourSums,
    LatentRgb,
    is_held_out,
    latent_pixel_colours,
    latents_to_rgb,
    solve,
)
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep, write_metadata


def encode(data: Path, output: Path, model: Path | str) -> Ran:
    ran = wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--output", output),
        *("--size", 64, "--video-sample-n-frames", 9, "--video-sample-stride", 1),
        *("--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of two shapes, photographs, and one video with two captions."""
    folder = tmp_path_factory.mktemp("colours")
    entries = []
    for number in range(6):
        name = f"clip{number}.mp4"
        size = (48, 80) if number % 2 else (64, 64)
        render_clip(folder / name, height=size[0], width=size[1], frames=11, seed=number)
        entries.append({"file_path": name, "text": f"clip {number}"})
    entries.append({"file_path": "clip0.mp4", "text": "the same again"})
    for picture in sorted(pictures.glob("*.png")):
        shutil.copy(picture, folder)
        entries.append({"file_path": picture.name, "text": picture.stem})
    write_metadata(folder, entries)
    return folder


@pytest.fixture(scope="module")
def cache(data: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    output = tmp_path_factory.mktemp("rgb") / "shards"
    encode(data, output, tiny_t2v)
    return Cache.open(output)


def pairs(cache: Cache, data: Path, *, held_out: bool) -> tuple[npt.NDArray, npt.NDArray]:
    """(cells, C+1) latents and (cells, 3) colours of the clips on one side, by the obvious code."""
    x, y = [], []
    for row in range(len(cache.index)):
        info = cache.info(row)
        if info["caption"] == "the same again" or is_held_out(cache.index.key(row)) != held_out:
            continue
        bucket = Bucket(info["height"], info["width"], info["frames"])
        frames = read_frames(data / info["source"], info["type"], info["frame_indices"])
        levels = fit(frames, bucket).astype(np.float64) / 255 * 2 - 1
        latents = cache.tensor(row, "latents").double().numpy()
        _, times, height, width = latents.shape
        for time in range(times):
            group = levels[:1] if time == 0 else levels[4 * time - 3 : 4 * time + 1]
            assert len(group) == (1 if time == 0 else 4)
            for top in range(height):
                for left in range(width):
                    block = group[:, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
                    x.append([*latents[:, time, top, left], 1.0])
                    y.append(block.mean(axis=(0, 1, 2)))
    return np.array(x), np.array(y)


def map_of(index: CacheIndex) -> LatentRgb:
    assert index.latent_rgb is not None
    return index.latent_rgb


def same(one: LatentRgb, other: LatentRgb) -> bool:
    """Equal but for the order in which numbers were added."""
    assert one.r2 is not None and other.r2 is not None
    return (
        np.allclose(one.weight, other.weight, rtol=1e-8, atol=1e-8)
        and np.allclose(one.bias, other.bias, rtol=1e-8, atol=1e-8)
        and abs(one.r2 - other.r2) < 1e-8
        and (one.samples, one.held_out) == (other.samples, other.held_out)
    )


def test_the_map_is_numpys_least_squares_over_the_real_pairs(cache: Cache, data: Path) -> None:
    found = map_of(cache.index)
    x, y = pairs(cache, data, held_out=False)
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(found.weight, expected[:-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.bias, expected[-1], rtol=1e-6, atol=1e-8)

    unseen, colours = pairs(cache, data, held_out=True)
    assert len(unseen), "no sample is held out: use other media"
    error = np.square(colours - unseen @ expected).sum()
    r2 = 1 - error / np.square(colours - colours.mean(axis=0)).sum()
    assert found.r2 == pytest.approx(r2, abs=1e-7)
    assert found.samples + found.held_out == 6 + 12  # clips, not captions


def test_reruns_new_captions_and_rebuilds_leave_the_map(
    cache: Cache, data: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    """The same media in two runs, then a new caption (latents copied, no frames seen)."""
    media, output = tmp_path / "data", tmp_path / "shards"
    shutil.copytree(data, media)
    entries = json.loads((data / "metadata.json").read_text())
    write_metadata(media, entries[:5])
    encode(media, output, tiny_t2v)
    write_metadata(media, entries)
    encode(media, output, tiny_t2v)
    assert same(map_of(Cache.open(output).index), map_of(cache.index))

    entries[1]["text"] = "edited"
    write_metadata(media, entries)
    encode(media, output, tiny_t2v)
    edited = map_of(Cache.open(output).index)
    assert same(edited, map_of(cache.index))

    (output / "manifest.json").unlink()
    shutil.rmtree(output / "index.zarr")
    assert wanprep("index", "--shards", output).code == 0
    assert map_of(Cache.open(output).index).to_json() == edited.to_json()


def test_sidecars_without_sums_are_read(cache: Cache, tmp_path: Path) -> None:
    """Shards of before the map existed; and one bad sum is named, with its cure."""
    output = tmp_path / "shards"
    shutil.copytree(cache.folder, output)
    sidecars = [Sidecar.path_for(output / name) for name in cache.index.shards]
    for path in sidecars:
        value = json.loads(path.read_text())
        del value["latent_rgb"]
        path.write_text(json.dumps(value))
    assert wanprep("index", "--shards", output).code == 0
    assert Cache.open(output).index.latent_rgb is None

    value["latent_rgb"] = {"fit": {"samples": 1, "sums": "AAAA"}, "held_out": None}
    path.write_text(json.dumps(value))
    ran = wanprep("index", "--shards", output)
    assert ran.code == 1 and str(path) in ran.err and "null" in ran.err


def test_the_quality_is_told_and_a_bad_map_is_warned_of(data: Path, tmp_path: Path) -> None:
    """The toy's VAE is trained, so its latents tell colours; a grey picture's tell nothing."""
    ran = encode(data, tmp_path / "shards", "toy")
    found = map_of(Cache.open(tmp_path / "shards").index)
    assert found.r2 is not None
    assert f"R² {found.r2:.2f} on {found.held_out} held out" in ran.out
    assert ("mislead" in ran.out) == (found.r2 < 0.5)


def random_sample(key: str, seed: int) -> ColourFit:
    """5 frames of 16×24 pixels whose colours are a linear function of 4 latents, without noise."""
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    colours = torch.from_numpy(latent_pixel_colours(frames, (2, 2, 3))).permute(3, 0, 1, 2)
    latents = torch.cat([2 * colours + 0.5, colours[:1] - colours[2:]])
    return ColourFit.of(key, ColourSums.of(frames, latents))


KEPT, HELD_OUT = "00000001" + "0" * 24, "00000008" + "0" * 24


def test_a_perfect_relation_is_found_and_shown() -> None:
    rgb = solve([random_sample(KEPT, 0), random_sample(HELD_OUT, 1)])
    assert rgb is not None and rgb.r2 == pytest.approx(1.0)
    frames = np.full((1, 16, 24, 3), (250, 10, 100), dtype=np.uint8)
    colours = torch.from_numpy(latent_pixel_colours(frames, (1, 2, 3))).permute(3, 0, 1, 2)
    latents = torch.cat([2 * colours + 0.5, colours[:1] - colours[2:]])
    assert np.array_equal(latents_to_rgb(latents, rgb), frames[:, :2, :3])
    with pytest.raises(ValueError, match=r"\(4, T, h, w\)"):
        latents_to_rgb(latents[:3], rgb)
    assert latents_to_rgb(100 * latents, rgb).dtype == np.uint8  # far outside: clamped


@pytest.mark.parametrize("key", [KEPT, HELD_OUT])
def test_a_single_sample_is_fitted_and_not_measured(key: str) -> None:
    rgb = solve([random_sample(key, 0)])
    assert rgb is not None and rgb.r2 is None and (rgb.samples, rgb.held_out) == (1, 0)
    assert solve([]) is None


def test_grey_media_give_a_finite_map() -> None:
    grey = np.full((1, 16, 24, 3), 128, dtype=np.uint8)
    sums = ColourSums.of(grey, torch.ones(4, 1, 2, 3))
    rgb = solve([ColourFit.of(KEPT, sums), ColourFit.of(HELD_OUT, sums)])
    assert rgb is not None and rgb.r2 is None and np.isfinite(rgb.weight).all()
    shown = latents_to_rgb(torch.ones(4, 1, 2, 3), rgb)
    assert np.array_equal(shown, grey[:, :2, :3])


def test_sums_survive_the_sidecar_to_the_bit(cache: Cache) -> None:
    for sidecar in committed_shards(cache.folder):
        if sidecar.kind == "samples":
            read = ColourFit.from_json(sidecar.latent_rgb)
            assert read.to_json() == sidecar.latent_rgb
            assert np.array_equal(read.fit.xx, read.fit.xx.T)
