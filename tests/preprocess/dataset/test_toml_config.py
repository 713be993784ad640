"""Several datasets in one TOML file, through the command line, on real media."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocess.dataset.clip_overrides import Resolution
from preprocess.dataset.toml_config import load_dataset_config
from shared.errors import UserError
from shared.format.buckets import bucket_size
from shared.format.cache import open_cache
from shared.io.store import Store
from tests.preprocess.conftest import PICTURES, REPOSITORY, Cache, render_clip, wanprep

Calls = Callable[[], dict[str, int]]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of videos (12 and 30 frames), one of pictures, one list."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("short", "long", "stills"):
        (folder / name).mkdir()
    render_clip(folder / "short/a.mp4", height=64, width=112, frames=12)
    render_clip(folder / "long/a.mp4", height=64, width=112, frames=30, seed=1)
    (folder / "short/a.txt").write_text("short a")
    (folder / "long/a.caption").write_text("long a")
    shutil.copy(PICTURES / "chelsea.png", folder / "stills/cat.png")
    (folder / "stills/cat.txt").write_text("a cat")
    render_clip(folder / "stills/not-this.mp4", height=64, width=64, frames=5)
    (folder / "list.jsonl").write_text(
        json.dumps({"video_path": "short/a.mp4", "caption": "another"}) + "\n"
    )
    return folder


def write(folder: Path, text: str) -> Path:
    file = folder / "datasets.toml"
    file.write_text(text)
    return file


def run_encode(model: Path, config: Path, output: Path, *extra: object) -> "tuple[Cache, str]":
    ran = wanprep(
        *("encode", "--model", model, "--dataset-config", config, "--output", output),
        *("--size", 64, "--video-sample-n-frames", 9, "--video-sample-stride", 1),
        *("--device", "cpu", "--num-workers", 2, *extra),
    )
    assert ran.code == 0, ran.err
    return Cache.open(output), ran.err


def dry_run(model: Path, shards: Path) -> str:
    """What `wantrain distill` would do with the shards."""
    program = Path(sys.executable).with_name("wantrain")
    command = [program, "distill", "--model", model, "--shards", shards, "--dry-run"]
    done = subprocess.run(
        [*map(str, command), "--boundary-type", "low", "--max-train-steps", "1"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


MUSUBI = """
[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
video_directory = "short"
cache_directory = "cache/short"
target_frames = [1, 5, 25]

[[datasets]]
video_directory = "long"
caption_extension = ".caption"
resolution = 96
num_repeats = 3

[[datasets]]
image_directory = "stills"
num_repeats = 2

[[datasets]]
video_jsonl_file = "list.jsonl"
target_frames = [5]
"""


def test_musubi_tuners_file(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    cache, _ = run_encode(tiny_t2v, write(media, MUSUBI), tmp_path)
    found = sorted(
        (
            Path(info["source"]).relative_to(media).as_posix(),
            info["caption"],
            (info["width"], info["height"], info["frames"]),
            info.get("repeats", 1),
        )
        for info in map(cache.info, range(len(cache.index)))
    )
    # 16:9 has the base bucket 672x384: 84x48 at size 64, floored to 80x48; 126x72 at 96.
    assert found == [
        ("long/a.mp4", "long a", (112, 64, 9), 3),  # no frames of its own: the command line's
        ("short/a.mp4", "another", (80, 48, 5), 1),  # one clip with two captions
        ("short/a.mp4", "short a", (80, 48, 1), 1),
        ("short/a.mp4", "short a", (80, 48, 5), 1),  # 25 frames are more than it has
        ("stills/cat.png", "a cat", (64, 48, 1), 2),
    ]
    index = open_cache(Store(tmp_path))
    assert sorted(index.repeats.tolist()) == [1, 1, 1, 2, 3]


DIFFUSION_PIPE = """
resolutions = [64, 96]
enable_ar_bucket = true
frame_buckets = [1, 5, 9, 33]

[[directory]]
path = "short"
num_repeats = 2

[[directory]]
path = "stills"
resolutions = [[64, 64]]
frame_buckets = [1]
"""


def test_diffusion_pipes_file(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    config = write(media, DIFFUSION_PIPE)
    ran = wanprep(
        *("encode", "--model", tiny_t2v, "--dataset-config", config, "--output", tmp_path),
        *("--video-sample-stride", 1, "--device", "cpu", "--max-bad", 1),
    )
    assert ran.code == 0, ran.err
    assert "not-this.mp4" in ran.err and "no caption" in ran.err
    cache = Cache.open(tmp_path)
    found = sorted(
        (info["caption"], info["width"], info["frames"], info.get("repeats", 1))
        for info in map(cache.info, range(len(cache.index)))
    )
    # Every resolution, in the longest frame bucket that the video has.
    assert found == [("a cat", 64, 1, 1), ("short a", 80, 9, 2), ("short a", 112, 9, 2)]


def test_repeats_change_without_an_encoder(
    media: Path, tiny_t2v: Path, tmp_path: Path, count_calls: "Calls"
) -> None:
    text = '[[datasets]]\nvideo_directory = "short"\nnum_repeats = {}\n'
    before, _ = run_encode(tiny_t2v, write(media, text.format(1)), tmp_path)
    members = ("latents.safetensors", "text.safetensors")
    info, bytes_ = before.info(0), [before.raw(0, member) for member in members]
    calls = count_calls()
    after, said = run_encode(tiny_t2v, write(media, text.format(4)), tmp_path)
    assert "1 to encode" in said
    assert count_calls() == calls
    assert after.info(0) == info | {"repeats": 4}
    assert [after.raw(0, member) for member in members] == bytes_
    assert "4 updates an epoch" in dry_run(tiny_t2v, tmp_path)
    # A dataset more, with sizes of its own, goes into the same cache.
    more = text.format(4) + '[[datasets]]\nimage_directory = "stills"\nresolution = 96\n'
    cache, said = run_encode(tiny_t2v, write(media, more), tmp_path)
    assert len(cache.index) == 2 and "1 in the shards, 1 to encode" in said


def test_named_resolutions_are_met() -> None:
    named = [(832, 480), (480, 832), (1280, 720), (960, 544), (624, 352), (512, 512)]
    sizes = [Resolution(width=width, height=height).size(16) for width, height in named]
    assert sizes == [640, 640, 976, 732, 480, 512]
    for (width, height), size in zip(named, sizes, strict=True):
        assert bucket_size(height, width, size=size, multiple=16) == (height, width)
    # 720 is no multiple of 32, so there is no such bucket: the size of about that area then.
    assert Resolution(width=1280, height=720).size(32) == 960


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[datasets]]\n", r"dataset 1: its media are given by nothing, expected one of video_d"),
        ("a = 1\n", r"expected tables \[\[datasets\]\] \(or \[\[directory\]\]\), found none"),
        ("[[datasets]\n", r"is no TOML \(.*line 1"),
        ('[[datasets]]\npath = "short"\ntarget_framse = 1\n', r"unknown key 'target_framse'\. Exp"),
        ('[[datasets]]\npath = "gone"\n', r"dataset 1: path: there is no folder gone"),
        ('[[datasets]]\nimage_jsonl_file = "x.jsonl"\n', r"image_jsonl_file: there is no file x"),
        ('[[datasets]]\npath = "short"\nmin_ar = 0.5\n', r"min_ar has no meaning here: aspect"),
        ('[[datasets]]\npath = "short"\nnum_repeats = 0\n', r"num_repeats is 0, expected a whole"),
        ('[[datasets]]\npath = "short"\ntarget_frames = [4]\n', r"\[4\], expected frames of the f"),
        ('[[datasets]]\npath = "short"\nresolution = [9]\n', r"\[9\], expected a size or \[width"),
        ('[[datasets]]\npath = "short"\nbucket_no_upscale = true\n', r"only false is supported"),
        ('[general]\npath = "short"\n[[datasets]]\n', r"path stands outside of a dataset"),
        (
            '[[datasets]]\npath = "short"\nresolution = 64\nresolutions = [64]\n',
            r"dataset 1: resolution and resolutions are both given",
        ),
    ],
)
def test_what_a_file_gets_wrong(media: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset_config(write(media, text))
