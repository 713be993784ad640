"""After any edit of a dataset only what changed is encoded, and the cache is as if made anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.preprocess.conftest import Cache, render_clip, wanprep

Calls = Callable[[], dict[str, int]]


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_only_what_changed_is_encoded(tiny_t2v: Path, tmp_path: Path, count_calls: Calls) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(data / f"{number}.png", number)
    render_clip(data / "clip.mp4", height=48, width=80, frames=5)  # 5 frames: two calls
    captions: dict[str, list[str]] = {f"{n}.png": [f"picture {n}"] for n in range(4)}
    captions["clip.mp4"] = ["a clip"]

    def encode(output: Path, *more: object) -> tuple[int, int, str]:
        """Encoder calls (VAE, text) and what was said."""
        entries = [
            {"file_path": name, "text": text} for name, texts in captions.items() for text in texts
        ]
        (data / "metadata.json").write_text(json.dumps(entries))
        before = count_calls()
        ran = wanprep(
            *("encode", "--model", tiny_t2v, "--train-data-dir", data, "--output", output),
            *("--size", 64, "--video-sample-n-frames", 5, "--video-sample-stride", 1),
            *("--device", "cpu", *more),
        )
        assert ran.code == 0, ran.err
        after = count_calls()
        vae, text = (after[n] - before[n] for n in ("WanEncoder3d", "UMT5EncoderModel"))
        return vae, text, ran.err + ran.out

    shards = tmp_path / "shards"
    assert encode(shards)[:2] == (4 + 2, 5 + 2)  # the empty and the negative prompt
    assert encode(shards)[:2] == (0, 0)

    # Media added.
    picture(data / "4.png", 4)
    captions["4.png"] = ["picture 4"]
    assert encode(shards)[:2] == (1, 1)
    # A caption edited, of a picture and of a clip; a second one for a picture.
    captions["0.png"] = ["picture 0, edited"]
    captions["clip.mp4"] = ["a clip, edited"]
    captions["1.png"] += ["picture 1, said otherwise"]
    vae, text, said = encode(shards)
    assert (vae, text) == (0, 3)
    assert "samples  7: 4 in the shards, 3 to encode" in said
    # Media edited.
    picture(data / "2.png", 22)
    vae, text, said = encode(shards)
    assert (vae, text) == (1, 1) and "leftover 1 in the shards" in said
    # A file renamed and another one copied: the content is there.
    (data / "3.png").rename(data / "three.png")
    shutil.copy(data / "4.png", data / "copy.png")
    captions["three.png"] = captions.pop("3.png")
    captions["copy.png"] = captions["4.png"]
    assert encode(shards)[:2] == (0, 0)
    # Media and a caption taken out.
    (data / "4.png").unlink()
    (data / "copy.png").unlink()
    del captions["4.png"], captions["copy.png"]
    captions["1.png"].pop()
    vae, text, said = encode(shards, "--prune")
    assert (vae, text) == (0, 0) and "3 samples removed" in said

    # As if made anew, but for the name of the file that was renamed.
    assert encode(tmp_path / "anew")[:2] == (4 + 2, 5 + 2)
    found, anew = (Cache.open(folder).contents() for folder in (shards, tmp_path / "anew"))
    differing = {name for name in found.keys() | anew.keys() if found.get(name) != anew.get(name)}
    assert [json.loads(found[name])["source"] for name in differing] == ["3.png"]
