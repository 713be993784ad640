"""Lists and configurations of other programs: read as they mean it, or refused with ours."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preprocess.dataset.entries import load_dataset
from preprocess.dataset.toml_config import load_dataset_config
from shared.errors import UserError
from tests.preprocess.conftest import Cache, render_clip, wanprep

BOM = "\ufeff"

# musubi-tuner's own examples, of a video of 40 frames: length → where its clips begin.
EXTRACTIONS = {
    'target_frames = [13, 25]\nframe_extraction = "head"\nmax_frames = 57': {13: [0], 25: [0]},
    'target_frames = [13, 25]\nframe_extraction = "chunk"': {13: [0, 13, 26], 25: [0]},
    'target_frames = [13, 25]\nframe_extraction = "uniform"\nframe_sample = 4': {
        13: [0, 9, 18, 27],
        25: [0, 5, 10, 15],
    },
    'target_frames = [13]\nframe_extraction = "uniform"\nframe_stride = 9': {13: [0]},
    'frame_extraction = "full"\nmax_frames = 31': {29: [0]},
    'target_frames = [1]\nframe_extraction = "full"': {37: [0]},
}


def test_musubi_tuners_frame_extraction(tmp_path: Path) -> None:
    """Through `wanprep encode`, from a file of Windows: the frames that musubi-tuner takes."""
    text = BOM + "[general]\r\nresolution = [64, 64]\r\nbatch_size = 1\r\n"
    for number, keys in enumerate(EXTRACTIONS):
        folder = tmp_path / "clips" / str(number)
        folder.mkdir(parents=True)
        render_clip(folder / "a.mp4", height=64, width=64, frames=40, seed=number)
        (folder / "a.txt").write_text(f"{BOM}clip {number}")
        text += f"[[datasets]]\nvideo_directory = 'clips\\{number}'\n{keys}\n"
    (tmp_path / "d.toml").write_text(text, encoding="utf-8")
    ran = wanprep(
        *("encode", "--model", "toy", "--dataset-config", tmp_path / "d.toml"),
        *("--video-sample-stride", 1, "--output", tmp_path / "shards", "--num-workers", 2),
    )
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "shards")
    found: dict[str, dict[int, list[int]]] = {}
    for info in map(cache.info, range(len(cache.index))):
        indices = info["frame_indices"]
        assert indices == list(range(indices[0], indices[0] + info["frames"]))
        found.setdefault(info["caption"], {}).setdefault(info["frames"], []).append(indices[0])
    sums = {
        caption: {frames: sorted(starts) for frames, starts in sorted(by_length.items())}
        for caption, by_length in found.items()
    }
    assert sums == {f"clip {n}": starts for n, starts in enumerate(EXTRACTIONS.values())}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            'frame_extraction = "slide"',
            r"'slide', expected one of head, .* write clips = \"uniform\"",
        ),
        ('frame_extraction = "half"', r"frame_extraction is 'half', expected one of head, chunk"),
        ("source_fps = 24.0", r"source_fps has no meaning here: .* write fps = 16\.0 in its place"),
        ("target_fps = 16.0", r"write fps = 16\.0 in its place"),
        ('frame_extraction = "head"\nclips = "random"', r"frame_extraction and clips are both"),
        ('frame_extraction = "full"\nvideo_sample_n_frames = 9', r"are both given, expected one"),
        ("max_frames = 0", r"max_frames is 0, expected a whole number of at least 1"),
        ('control_directory = "c"', r"there are no control images\. Delete the line"),
        ("qwen_image_edit_no_resize_control = true", r"no control images"),
        ('mask_directory = "m"', r"there are no masks"),
        ("fp_1f_no_post = true", r"it is FramePack's\. Delete"),
        ("multiple_target = true", r"multiple_target is True, only false is supported"),
        (
            "[[datasets.subsets]]\nnum_repeats = 2",
            r"Write a \[\[datasets\]\] table for each subset",
        ),
        (
            "enable_bucket = false\nresolution = [960, 544]",
            r"there are squares.* write fix_sample_size = \[544, 960\] in place of both",
        ),
    ],
)
def test_what_has_another_meaning_is_refused_with_ours(
    keys: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("t")
    (tmp_path / "d.toml").write_text(f'[[datasets]]\nvideo_directory = "{tmp_path}"\n{keys}\n')
    with pytest.raises(UserError, match=message):
        load_dataset_config(tmp_path / "d.toml")


def test_buckets_that_are_off_at_a_square_are_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("t")
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\npath = "{tmp_path}"\nenable_bucket = false\nresolution = [512, 512]\n'
    )
    (entry,) = load_dataset_config(tmp_path / "d.toml").entries
    assert entry.sampling.own == {"buckets": False}


ROWS = [("a.mp4", "one"), ("sub/b.png", "two")]


def as_csv(path: Path, encoding: str) -> None:
    with path.open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows([("file_path", "text"), *ROWS])


FORMS: dict[str, tuple[str, Callable[[Path, str], Any]]] = {
    "list": (
        "json",
        lambda path, encoding: path.write_text(
            json.dumps([{"file_path": name, "text": text} for name, text in ROWS]), encoding
        ),
    ),
    "lines": (
        "jsonl",
        lambda path, encoding: path.write_text(
            "\r\n".join(json.dumps({"file_name": name, "caption": text}) for name, text in ROWS),
            encoding,
        ),
    ),
    "table": ("csv", as_csv),
    "path: caption": (
        "json",
        lambda path, encoding: path.write_text(json.dumps(dict(ROWS)), encoding),
    ),
    "kohya's": (
        "json",
        lambda path, encoding: path.write_text(
            json.dumps({name: {"caption": text, "tags": "x, y"} for name, text in ROWS}), encoding
        ),
    ),
    "by number": (
        "json",
        lambda path, encoding: path.write_text(
            json.dumps({n: {"video_path": name, "caption": text}
                        for n, (name, text) in enumerate(ROWS)}), encoding,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list_says_the_same(form: str, encoding: str, tmp_path: Path) -> None:
    ending, write = FORMS[form]
    write(tmp_path / f"list.{ending}", encoding)
    dataset = load_dataset(tmp_path, tmp_path / f"list.{ending}")
    assert [(entry.source, entry.caption) for entry in dataset.entries] == ROWS
    assert dataset.rejected == ()
    assert {entry.tags for entry in dataset.entries} == {("x", "y") if form == "kohya's" else ()}


def test_an_object_path_to_caption(tmp_path: Path) -> None:
    """What stands twice is there twice; what is no caption is named by its path."""
    (tmp_path / "metadata.json").write_text(
        '{"a.mp4": "one", "a.mp4": "two", "b.mp4": ["three", "four"], "c.mp4": {}, "d.mp4": 5}'
    )
    dataset = load_dataset(tmp_path, None)
    assert [(entry.source, entry.caption) for entry in dataset.entries] == [
        ("a.mp4", "one"),
        ("a.mp4", "two"),
        ("b.mp4", "three"),
        ("b.mp4", "four"),
    ]
    assert {one.source for one in dataset.rejected} == {"c.mp4", "d.mp4"}


@pytest.mark.parametrize("content", ['{"data": [{"file_path": "a.mp4", "text": "t"}]}', "{}",
                                     '{"file_path": "a.mp4", "text": "t"}'])  # fmt: skip
def test_another_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=r"holds an object\. Expected a JSON list"):
        load_dataset(tmp_path, None)


def test_paths_of_windows_in_lists(tmp_path: Path) -> None:
    """A file here is found, another refused with a cure; names here may have backslashes."""
    names = ("clips/a.png", "c\\d.png", "c/d.png")
    for shade, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (80 * shade, 9, 9)).save(tmp_path / name)
    paths = ["clips\\a.png", ".\\clips\\a.png", "c\\d.png", "gone\\e.png", "C:\\data\\f.png",
             "D:/data/g.png"]  # fmt: skip
    records = [{"file_path": path, "text": path} for path in paths]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    ran = wanprep(
        *("encode", "--model", "toy", "--train-data-dir", tmp_path, "--size", 64, "--max-bad", 3),
        *("--output", tmp_path / "shards", "--num-workers", 1),
    )
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "shards")
    infos = [cache.info(row) for row in range(len(cache.index))]
    assert {(info["source"], info["caption"]) for info in infos} == {
        ("clips/a.png", "clips\\a.png"),
        ("clips/a.png", ".\\clips\\a.png"),
        ("c\\d.png", "c\\d.png"),
    }
    lines = (tmp_path / "shards/rejected.jsonl").read_text().splitlines()
    rejected = {one["source"]: one["reason"] for one in map(json.loads, lines)}
    # The source is as a cache would have it, so that --prune spares a file of yesterday.
    assert rejected.keys() == {"gone/e.png", "C:/data/f.png", "D:/data/g.png"}
    for reason in rejected.values():
        assert "backslash" in reason and "Write it with /, relative to --train-data-dir" in reason


INVISIBLE = ["", " \n", "\u200b", BOM + BOM, "\u00a0", "\u00ad", "\u2060\u200d", "\u3164", "\u2800",
             "\ufe0f", "\u2028", "\u00ad\u200b \u00a0\t\x00"]  # fmt: skip


@pytest.mark.parametrize("nothing", INVISIBLE)
def test_a_caption_that_nobody_sees_is_empty(nothing: str, tmp_path: Path) -> None:
    """In captions beside media, in lists, tables and lines; with one that is seen, it is not."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "a.txt").write_text(nothing, encoding="utf-8")
    (tmp_path / "b.txt").write_text(f"{nothing}❤\ufe0f", encoding="utf-8")
    beside = load_dataset(tmp_path, None)
    assert [(one.source, one.reason) for one in beside.rejected] == [
        ("a.mp4", "the caption is empty")
    ]
    assert ["❤" in entry.caption for entry in beside.entries] == [True]

    records = [{"file_path": "a.mp4", "text": nothing},
               {"file_path": "b.mp4", "text": nothing, "caption": "seen"}]  # fmt: skip
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "l.json").write_text(json.dumps({"a.mp4": nothing, "b.mp4": "seen"}))
    with (tmp_path / "l.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = [("a.mp4", nothing, ""), ("b.mp4", nothing, "seen")]
        csv.writer(stream).writerows([("file_path", "text", "caption"), *rows])
    for name in ("l.jsonl", "l.json", "l.csv"):
        listed = load_dataset(tmp_path, tmp_path / name)
        assert [(entry.source, entry.caption) for entry in listed.entries] == [("b.mp4", "seen")]
        assert [one.source for one in listed.rejected] == ["a.mp4"]
    (tmp_path / "p.txt").write_text(f"one\n{nothing}\ntwo", encoding="utf-8")
    lines = load_dataset(tmp_path, tmp_path / "p.txt")
    assert [entry.caption for entry in lines.entries] == ["one", "two"]
