"""Reading `metadata.json` and folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from preprocess.dataset import load_dataset
from shared.errors import UserError


def listed(folder: Path, *entries: Any) -> Path:
    (folder / "metadata.json").write_text(json.dumps(entries))
    return folder


def test_the_seeds_metadata(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    data = tmp_path / "data"
    data.mkdir()
    listed(
        data,
        {"file_path": "a/b.mp4", "text": " hello\n", "type": "video", "width": 1, "height": 2},
        {"file_path": str(outside), "text": "two", "type": "image"},
        {"file_path": str(data / "c.JPG"), "text": "three"},
    )
    dataset = load_dataset(data, None)
    assert dataset.rejected == ()
    assert [(e.path, e.source, e.caption, e.type) for e in dataset.entries] == [
        (data / "a/b.mp4", "a/b.mp4", "hello", "video"),
        (outside, str(outside), "two", "image"),
        (data / "c.JPG", "c.JPG", "three", "image"),  # relative where it lies inside
    ]


def test_a_folder_with_captions_beside_the_media(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.png", "notes.pdf", ".hidden.mp4", "lonely.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("a caption\n", encoding="utf-8-sig")
    (tmp_path / "a/c.txt").write_bytes(b"\xff\xfe\xfa")
    dataset = load_dataset(tmp_path, None)
    assert [(e.source, e.caption, e.type) for e in dataset.entries] == [
        ("b.mp4", "a caption", "video")
    ]
    assert {(r.source, r.reason) for r in dataset.rejected} == {
        ("a/c.png", "the caption c.txt is not UTF-8 text"),
        ("lonely.mp4", "no caption: cannot read lonely.txt beside it"),
    }


@pytest.mark.parametrize(
    ("entry", "source", "reason"),
    [
        ("x.mp4", "metadata.json[0]", "the entry is a str, expected an object"),
        ({"text": "t"}, "metadata.json[0]", "file_path is None"),
        ({"file_path": 7, "text": "t"}, "metadata.json[0]", "file_path is 7"),
        ({"file_path": "x.mp4"}, "x.mp4", "text is None, expected the caption"),
        ({"file_path": "x.mp4", "text": ["t"]}, "x.mp4", "text is ['t'], expected the caption"),
        ({"file_path": "x.mp4", "text": " \n"}, "x.mp4", "the caption is empty"),
        ({"file_path": "x.mp4", "text": "\ud800"}, "x.mp4", "lone surrogates"),
        ({"file_path": "x.pdf", "text": "t"}, "x.pdf", "unknown extension '.pdf'"),
        ({"file_path": "x.mp4", "text": "t", "type": "audio"}, "x.mp4", "type is 'audio'"),
    ],
)
def test_a_bad_entry_is_left_out(tmp_path: Path, entry: Any, source: str, reason: str) -> None:
    dataset = load_dataset(listed(tmp_path, entry, {"file_path": "y.png", "text": "good"}), None)
    assert [e.source for e in dataset.entries] == ["y.png"]
    (rejected,) = dataset.rejected
    assert rejected.source == source
    assert reason in rejected.reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", "metadata.json is not valid JSON"),
        (b"\xff\xfe\x00", "metadata.json is not valid JSON"),
        (b'{"file_path": "x"}', "metadata.json holds a dict. Expected a JSON list"),
    ],
)
def test_unreadable_metadata_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "metadata.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_dataset(tmp_path, None)


def test_no_dataset_names_the_flag_and_the_variable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--train-data-dir \(or DATASET_NAME\)"):
        load_dataset(tmp_path / "datasets", None)
    with pytest.raises(UserError, match=r"has no metadata\.json and no media"):
        load_dataset(tmp_path, None)
    with pytest.raises(UserError, match=r"--train-data-meta \(or DATASET_META_NAME\)"):
        load_dataset(tmp_path, tmp_path / "nowhere.json")


def test_metadata_elsewhere_needs_the_folder_that_it_is_relative_to(tmp_path: Path) -> None:
    listed(tmp_path, {"file_path": "x.mp4", "text": "t"})
    with pytest.raises(UserError, match=r"no folder .*datasets"):
        load_dataset(tmp_path / "datasets", tmp_path / "metadata.json")
