"""`wanprep verify --decode`: samples through the VAE, against a decode that is not ours."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import decord
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image, ImageOps

from preprocess.verify.decode_samples import PSNR_FLOOR
from shared.models.toy_model import toy_folder
from tests.models import full_once, tiny_model
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep, write_metadata


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(media, shards): a clip and a picture by the toy's VAE, which was trained."""
    folder = tmp_path_factory.mktemp("decode")
    data, shards = folder / "data", folder / "shards"
    data.mkdir()
    render_clip(data / "clip.mp4", height=72, width=128, frames=20, seed=3)
    Image.new("RGB", (90, 64), (200, 40, 90)).save(data / "flat.png")
    names = ("clip.mp4", "flat.png")
    write_metadata(data, [{"file_path": name, "text": name} for name in names])
    ran = wanprep(
        *("encode", "--model", "toy", "--train-data-dir", data, "--size", 64, "--device", "cpu"),
        *("--video-sample-n-frames", 9, "--output", shards),
    )
    assert ran.code == 0, ran.err
    return data, shards


def decode(toy: tuple[Path, Path], output: Path, *more: object, model: object = "toy") -> Ran:
    data, shards = toy
    return wanprep(
        *("verify", "--shards", shards, "--train-data-dir", data, "--model", model),
        *("--output", output, "--device", "cpu", *more),
    )


def said_db(ran: Ran) -> dict[str, float]:
    """Source → PSNR, as printed."""
    found = re.findall(r"(?m)^\S+  ([\d.]+) dB  (\S+)$", ran.out)
    return {source: float(value) for value, source in found}


def reference(latents: torch.Tensor) -> np.ndarray[Any, Any]:
    """uint8 frames, as `WanPipeline.__call__` ends: denormalise, decode, to 0..255."""
    vae = AutoencoderKLWan.from_pretrained(toy_folder("toy") / "vae", torch_dtype=torch.float32)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = vae.decode(latents[None].float() / std + mean, return_dict=False)[0][0]
    return ((video / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy() * 255).round()


def test_the_number_is_that_of_the_source(toy: tuple[Path, Path], tmp_path: Path) -> None:
    ran = decode(toy, tmp_path / "out", "--decode", 2)
    printed = said_db(ran)
    assert printed.keys() == {"clip.mp4", "flat.png"}
    cache = Cache.open(toy[1])
    for source, psnr in printed.items():
        row = cache.row(source=source)
        info = cache.info(row)
        frames = reference(cache.tensor(row, "latents"))
        if source == "clip.mp4":
            video = decord.VideoReader(str(toy[0] / source))
            given = [Image.fromarray(video[i].asnumpy()) for i in info["frame_indices"]]
        else:
            given = [Image.open(toy[0] / source)]
        size = (info["width"], info["height"])
        fitted = np.stack(
            [np.asarray(ImageOps.fit(image, size, Image.Resampling.BILINEAR)) for image in given]
        )
        expected = 10 * math.log10(255**2 / np.square(frames - fitted).mean())
        assert psnr == pytest.approx(expected, abs=1.5)  # `fit` crops before it resizes
        path = tmp_path / "out" / f"{cache.index.key(row)}.{'mp4' if len(frames) > 1 else 'png'}"
        shown = (
            decord.VideoReader(str(path))[:].asnumpy()
            if len(frames) > 1
            else np.asarray(Image.open(path))[None]
        )
        assert shown.shape == frames.shape
        assert np.abs(shown - frames).mean() < 10  # what H.264 leaves of colour noise


def test_the_seed_draws_and_a_key_names(toy: tuple[Path, Path], tmp_path: Path) -> None:
    index = Cache.open(toy[1]).index
    drawn = {
        seed: sorted(said_db(decode(toy, tmp_path / str(seed), "--decode", 1, "--seed", seed)))
        for seed in range(6)
    }
    assert len({tuple(names) for names in drawn.values()}) == 2
    again = decode(toy, tmp_path / "again", "--decode", 1, "--seed", 3)
    assert sorted(said_db(again)) == drawn[3]
    for row in range(2):
        ran = decode(toy, tmp_path / "named", "--sample", index.key(row))
        assert index.key(row) in ran.out and len(said_db(ran)) == 1


def test_a_source_that_changed_is_a_note_and_no_number(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    data = Path(shutil.copytree(toy[0], tmp_path / "data"))
    render_clip(data / "clip.mp4", height=72, width=128, frames=20, seed=4)
    (data / "flat.png").unlink()
    ran = decode((data, toy[1]), tmp_path / "out", "--decode", 2)
    assert ran.code == 0 and said_db(ran) == {}
    assert ran.out.count("source-missing") == 2
    assert "its content is not what was encoded" in ran.out and "no such file" in ran.out
    assert len(list((tmp_path / "out").iterdir())) == 2  # to be looked at all the same


def test_what_does_not_fit_the_card_is_decoded_in_tiles(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_once(monkeypatch)
    ran = decode(toy, tmp_path / "out", "--decode", 2)
    assert ran.err.count("decoded in tiles") == 1
    assert len(said_db(ran)) == 2


def test_pictures_far_from_their_source_are_an_error(tmp_path: Path) -> None:
    """A VAE that was never trained gives back noise."""
    data, shards = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    render_clip(data / "clip.mp4", height=64, width=96, frames=9, seed=1)
    (data / "clip.txt").write_text("a clip")
    model = tiny_model(tmp_path / "model", "t2v")
    encode = ("encode", "--model", model, "--train-data-dir", data, "--output", shards)
    assert wanprep(*encode, "--size", 64, "--video-sample-n-frames", 5, "--device", "cpu").code == 0
    ran = decode((data, shards), tmp_path / "out", "--decode", 5, model=model)
    assert ran.code == 1
    (psnr,) = said_db(ran).values()
    assert psnr < PSNR_FLOOR and f"expected at least {PSNR_FLOOR:g} dB" in ran.out


def test_another_vae_is_refused(toy: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "t2v")
    ran = decode(toy, tmp_path / "out", "--decode", 1, model=model)
    assert ran.code == 1 and "was encoded by another VAE" in ran.err and "latents.vae" in ran.err
    assert not (tmp_path / "out").exists()
