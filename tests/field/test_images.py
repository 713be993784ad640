"""Sound images are read whatever lies beside their pixels, and are what viewers show."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from preprocess.media.reader import MediaError, probe, read_frames
from shared.io import stills
from tests.field.picture import number_of, picture
from tests.preprocess.conftest import Cache, wanprep
from train.sampling.sample import fit_image


@pytest.mark.parametrize("how", ["tEXt", "zTXt", "iTXt"])
def test_a_png_with_a_large_workflow(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    info = PngImagePlugin.PngInfo()
    workflow = json.dumps({"nodes": "x" * (70 << 20)})  # PIL's limit of all texts is 64 MB
    if how == "iTXt":
        info.add_itxt("workflow", workflow, zip=True)
    else:
        info.add_text("workflow", workflow, zip=how == "zTXt")
    Image.fromarray(picture(7)).save(path, pnginfo=info)
    assert probe(path, "auto").type == "image"
    assert number_of(next(read_frames(path, "image", [0]))) == 7
    assert fit_image(path, 64, 96).size == (96, 64)


def test_a_panorama_is_read_and_a_bomb_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (20000, 10000)).save(path)  # 200 megapixels
    assert (probe(path, "image").width, probe(path, "image").height) == (20000, 10000)
    Image.new("1", (stills.MOST_PIXELS // 64 + 1, 64)).save(path)
    with pytest.raises(
        MediaError, match=r"8388609x64 pixels are too many, expected at most 512 Mi"
    ):
        probe(path, "image")


def test_transparency_is_on_white_and_said(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    clear = np.dstack([picture(7), np.full((64, 96), 255, np.uint8)])
    Image.fromarray(clear).save(media / "opaque.png")
    clear[:, :48, 3] = 0
    Image.fromarray(clear).save(media / "clear.png")
    Image.fromarray(clear).save(media / "clear.webp", lossless=True, exact=True)
    for path in (*media.glob("*.png"), *media.glob("*.webp")):
        path.with_suffix(".txt").write_text(f"of {path.suffix}")
    ran = wanprep("encode", "--model", "toy", "--size", 64, "--train-data-dir", media,
                  "--output", tmp_path / "shards")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "noted    2 files transparent in part, taken on white: clear.png, clear.webp" in ran.err
    assert len(Cache.open(tmp_path / "shards").index) == 3
    for name in ("clear.png", "clear.webp"):
        frame = next(read_frames(media / name, "image", [0]))
        assert (frame[:, :48] == 255).all()
        assert np.array_equal(frame[:, 48:], picture(7)[:, 48:])
        assert np.array_equal(np.asarray(fit_image(media / name, 64, 96)), frame)  # of wantrain
