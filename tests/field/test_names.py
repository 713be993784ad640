"""Names that FFmpeg, decord, shells or UTF-8 take for something else reach their files."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocess.media.reader import probe, read_frames
from preprocess.media.tars import media_named
from tests.field import ffmpeg
from tests.field.codecs import h264
from tests.field.picture import number_of, picture
from tests.preprocess.conftest import Cache, wanprep

STEMS = (
    *("2024-05-01T12:30:45", "https:x", "pipe:0", "file:x", "concat:a|b", "data:,x"),
    *("subfile,,start,0,end,9,,:x", "-i", "--help", "1%03d", "%d", "what?", "*", "[a]", "{a,b}"),
    *("a#b", "q'uo\"te", "back\\slash", "$HOME `x`", "a;b&c|d", "two\nlines", "tab\tx", "end "),
    *("~x", "\u202ex", "caf\udce9"),
)
OPTIONS = ("--model", "toy", "--size", 64, "--video-sample-n-frames", 9, "--clips", "first")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, so that names stand alone."""
    media = tmp_path / "media"
    media.mkdir()
    monkeypatch.chdir(media)
    yield media


def clip(stem: str, number: int) -> None:
    """A video of pictures from `number` on, with a caption, in the working folder."""
    made = ffmpeg.encode(Path("made.mp4"), *h264(), numbers=range(number, number + 18))
    made.rename(f"{stem}.mp4")
    Path(f"{stem}.txt").write_text(f"clip {number}")


def test_from_within_the_folder(inside: Path) -> None:
    for number, stem in enumerate(STEMS):
        clip(stem, number)
    ran = wanprep("encode", *OPTIONS, "--train-data-dir", ".", "--output", "../shards")
    assert ran.code == 0, ran.err
    cache = Cache.open(inside.parent / "shards")
    stems = {f"{stem}.mp4".encode("utf-8", "backslashreplace").decode() for stem in STEMS}
    assert {cache.info(row)["source"] for row in range(len(cache.index))} == stems
    for number, stem in enumerate(STEMS):
        frame = next(read_frames(Path(f"{stem}.mp4"), "video", [3]))
        assert number_of(frame) == number + 3


@pytest.mark.parametrize("stem", STEMS)
def test_what_decord_reads(stem: str, inside: Path) -> None:
    path = ffmpeg.encode(Path("made.avi"), "-c:v", "utvideo", numbers=range(9)).rename(
        f"{stem}.avi"
    )
    assert probe(path, "video").frames == 9
    assert [number_of(frame) for frame in read_frames(path, "video", [0, 8])] == [0, 8]


def test_a_name_is_no_pattern_of_other_files(inside: Path) -> None:
    from PIL import Image

    for number, name in ((7, "b%03d.jpg"), (1, "b001.jpg"), (2, "b002.jpg")):
        Image.fromarray(picture(number)).save(name, quality=95)
    assert probe(Path("b%03d.jpg"), "video").frames == 1
    assert number_of(next(read_frames(Path("b%03d.jpg"), "video", [0]))) == 7


def test_every_command_takes_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """From a zip of a Windows machine: caf\\xe9.mp4, in a folder of such a name."""
    media, shards = tmp_path / "d\udce9", tmp_path / "s\udce9"
    media.mkdir()
    clip(str(media / "caf\udce9"), 5)
    (media / "bad\udce9.mp4").write_text("no video")
    (media / "bad\udce9.txt").write_text("a text")

    def run(*arguments: object) -> str:
        ran = wanprep(*arguments)
        assert ran.code == 0, ran.err
        return ran.out + ran.err

    encode = (*OPTIONS, "--max-bad", 1, "--train-data-dir", media, "--output", shards)
    assert "64x48, 9 frames" in run("plan", *encode)
    assert "1 sample in 1 shard" in run("encode", *encode)
    (line,) = (shards / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == r"bad\udce9.mp4"
    assert "nothing to do" in run("encode", *encode)
    assert Cache.open(shards).info(0)["source"] == r"caf\udce9.mp4"
    assert media_named(media, r"caf\udce9.mp4") == media / "caf\udce9.mp4"
    toy = ("--model", "toy", "--train-data-dir", media)
    assert "no errors" in run("verify", "--shards", shards)
    decoded = wanprep("verify", "--shards", shards, *toy, "--decode", 1, "--output", tmp_path / "o")
    assert r"dB  caf\udce9.mp4" in decoded.out and "source-missing" not in decoded.out
    run("inspect", "--shards", shards, "--html", tmp_path / "page.html")
    assert r"caf\udce9.mp4" in (tmp_path / "page.html").read_text()
    shutil.rmtree(shards / "index.zarr")
    run("index", "--shards", shards)
    (media / "caf\udce9.txt").write_text("another caption")
    assert "1 caption, 1 of them new" in run("recaption", "--name", "o", "--shards", shards, *toy)
    to_i2v = ("--model", "toy-i2v", "--train-data-dir", media)
    assert "1 condition, 1 of them new" in run("add-condition", "--shards", shards, *to_i2v)
    assert "0 left" in run("remove", "--shards", shards, "--sample", os.fsdecode(b"caf\xe9.mp4"))
