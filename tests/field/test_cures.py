"""The ffmpeg command in a rejection repairs the file: it is run, and its output encoded."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess.media.reader import MediaError, probe, read_frames
from tests.field import boxes, ffmpeg
from tests.field.cells import FRAMES, Cell
from tests.field.clips import CELLS
from tests.field.picture import number_of, picture
from tests.preprocess.conftest import Cache, wanprep

COMMAND = re.compile(r"ffmpeg .*OUT\.(?:mp4|png)")
CHOICES = [cell for cell in CELLS if cell.oddity in ("alpha", "HDR")]
DAMAGED = ("mp4-h-264-b-frames.mp4", "mov-prores-nothing-odd.mov", "webm-av1-nothing-odd.webm")
OPTIONS = ("--model", "toy", "--size", 64, "--video-sample-n-frames", 9, "--clips", "first")


def cell_named(name: str) -> Cell:
    (cell,) = (cell for cell in CELLS if cell.name == name)
    return cell


def repaired(reason: str, path: Path) -> Path:
    """What the command in a reason makes of the file, as a user would run it in a shell."""
    found = COMMAND.search(reason)
    assert found, reason
    out = path.with_name(f"repaired{found[0][-4:]}")
    names = {"IN": str(path), f"OUT{out.suffix}": str(out)}
    words = [names.get(word, word) for word in shlex.split(found[0])]
    subprocess.run([ffmpeg.FFMPEG, *words[1:]], check=True, stdin=subprocess.DEVNULL, timeout=60)
    return out


def reason_of(path: Path) -> str:
    """Why `wanprep encode` rejects the file."""
    path.with_suffix(".txt").write_text("a clip")
    shards = path.parent / "rejecting"
    assert wanprep("encode", *OPTIONS, "--train-data-dir", path.parent, "--output", shards).code
    (line,) = (shards / "rejected.jsonl").read_text().splitlines()
    return str(json.loads(line)["reason"])


def encoded(path: Path) -> dict[str, object]:
    """The one sample that `wanprep encode` makes of a file."""
    folder = path.parent / "alone"
    folder.mkdir()
    shutil.copy(path, folder)
    (folder / path.name).with_suffix(".txt").write_text("a clip")
    ran = wanprep("encode", *OPTIONS, "--train-data-dir", folder, "--output", folder / "shards")
    assert ran.code == 0, ran.err
    cache = Cache.open(folder / "shards")
    assert len(cache.index) == 1
    return cache.info(0)


@pytest.mark.parametrize("cell", CHOICES, ids=lambda cell: cell.name)
def test_a_choice_is_made_by_the_command(
    cell: Cell, made: Callable[[Cell], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(made(cell), tmp_path))
    out = repaired(reason_of(path), path)
    assert probe(out, "video").frames == len(FRAMES)
    frame = next(read_frames(out, "video", [7])).astype(float)
    if cell.oddity == "alpha":  # half of it is white now
        half = (picture(7).astype(float) + 255) / 2
        assert np.abs(frame - half).mean() < 6
    else:  # darkest and brightest are apart, as in a picture for SDR
        assert np.ptp(frame) > 200
    assert encoded(out)["frame_indices"] == list(range(0, 18, 2))


@pytest.mark.parametrize("name", DAMAGED)
def test_what_lies_before_damage_is_kept(name: str, tmp_path: Path) -> None:
    edit = lambda path: boxes.damage_packet(path, 40, "noise")  # noqa: E731
    path = replace(cell_named(name), size=(384, 256), edits=(edit,)).make(tmp_path)
    out = repaired(reason_of(path), path)
    seen = probe(out, "video")
    assert 20 <= seen.frames <= 40
    numbers = [number_of(frame) for frame in read_frames(out, "video", range(seen.frames))]
    assert numbers == list(range(seen.frames))
    assert encoded(out)["type"] == "video"


def test_a_slanted_video_is_rotated_by_the_command(tmp_path: Path) -> None:
    plain = cell_named("mp4-h-264-nothing-odd.mp4").make(tmp_path)
    path = tmp_path / "slanted.mp4"
    ffmpeg.run("-display_rotation", 30, "-i", plain, "-c", "copy", path)
    plain.unlink()
    assert probe(repaired(reason_of(path), path), "video").frames == len(FRAMES)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", ("-pix_fmt", "rgb48be")),
        ("a.avif", ("-c:v", "libaom-av1", "-still-picture", "1", "-pix_fmt", "yuv420p10le")),
    ],
)
@pytest.mark.parametrize("curve", ["smpte2084", "arib-std-b67"])
def test_an_hdr_image_is_no_washed_out_one(
    name: str, options: tuple[str, ...], curve: str, tmp_path: Path
) -> None:
    plain, path = tmp_path / "plain.bmp", tmp_path / name
    Image.fromarray(picture(7)).save(plain)
    matrix = "gbr" if name == "a.png" else "bt2020nc"
    layout = "gbrp16" if name == "a.png" else "yuv420p10le"
    said = f"setparams=color_primaries=bt2020:color_trc={curve}:colorspace={matrix}"
    ffmpeg.run("-i", plain, "-vf", f"format={layout},{said}", *options, path)
    plain.unlink()
    reason = reason_of(path)
    assert f"HDR ({curve})" in reason
    out = repaired(reason, path)
    assert np.ptp(next(read_frames(out, "image", [0])).astype(int)) > 200
    assert encoded(out)["type"] == "image"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><title>404</title>", "it is a text that begins '<!DOCTYPE html>"),
        ("{\"e\": \"Überlast\"}".encode(), "it is a text that begins"),
        (bytes(9999), "it begins with zeros only"),
        (b"\x00\x00\x00\x14ftypisom\x00\x00\x02\x00isom\x00\x00\x10\x00mdat", "index .moov."),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_in_plain_words(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=said):
        probe(path, "video")
