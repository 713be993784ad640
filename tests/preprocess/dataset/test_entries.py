"""Reading `metadata.json` and folders."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preprocess.dataset.entries import load_dataset
from shared.errors import UserError
from tests.preprocess.conftest import Cache, render_clip, wanprep


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
        ("x.mp4", "metadata.json[0]", "the entry is a string, expected an object"),
        (None, "metadata.json[0]", "the entry is null, expected an object"),
        ({"text": "t"}, "metadata.json[0]", "no file_path or video_path or image_path or file_na"),
        ({"file_path": "", "text": "t"}, "metadata.json[0]", 'file_path is "", expected the path'),
        ({"file_path": 7, "text": "t"}, "metadata.json[0]", "file_path is 7"),
        ({"file_path": "x.mp4"}, "x.mp4", "no text or caption or captions, expected"),
        (
            {"file_path": "x.mp4", "text": ["t", 1]},
            "x.mp4",
            'text is ["t", 1], expected a caption or',
        ),
        ({"file_path": "x.mp4", "text": " \n"}, "x.mp4", "the caption is empty"),
        ({"file_path": "x.mp4", "text": "\ud800"}, "x.mp4", "lone surrogates"),
        ({"file_path": "x.pdf", "text": "t"}, "x.pdf", "unknown extension '.pdf'"),
        ({"file_path": "x.mp4", "text": "t", "type": "audio"}, "x.mp4", "type is 'audio'"),
        ({"file_path": "x.mp4", "text": "t", "tags": {"a": 1}}, "x.mp4", 'tags is {"a": 1}, exp'),
        ({"file_path": "x.mp4", "text": "t", "tags": ["a", 1]}, "x.mp4", 'tags is ["a", 1], expe'),
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
        (b"\xff\xfe\x00", r"metadata.json is not UTF-8 text .* Save it as UTF-8"),
        (b'{"file_path": "x"}', r"holds an object\. .* rename the file to metadata\.jsonl if it"),
    ],
)
def test_unreadable_metadata_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "metadata.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_dataset(tmp_path, None)


def test_no_dataset_names_the_flag_and_the_variable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--train-data-dir \(or DATASET_NAME\)"):
        load_dataset(tmp_path / "datasets", None)
    with pytest.raises(
        UserError, match=r"has no metadata\.json or metadata\.jsonl .* and no media"
    ):
        load_dataset(tmp_path, None)
    with pytest.raises(UserError, match=r"--train-data-meta \(or DATASET_META_NAME\)"):
        load_dataset(tmp_path, tmp_path / "nowhere.json")


def test_metadata_elsewhere_needs_the_folder_that_it_is_relative_to(tmp_path: Path) -> None:
    listed(tmp_path, {"file_path": "x.mp4", "text": "t"})
    with pytest.raises(UserError, match=r"no folder .*datasets"):
        load_dataset(tmp_path / "datasets", tmp_path / "metadata.json")


ROWS = [
    ("a.mp4", 'comma, "quote"\nand line\u2028break'),
    ("b.png", "two"),
]


@pytest.mark.parametrize("path_field", ["file_path", "video_path", "image_path", "file_name"])
@pytest.mark.parametrize("caption_field", ["text", "caption"])
@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_every_form_and_field_name_says_the_same(
    tmp_path: Path, form: str, path_field: str, caption_field: str
) -> None:
    records = [{path_field: path, caption_field: caption} for path, caption in ROWS]
    file = tmp_path / f"metadata.{form}"
    if form == "json":
        file.write_text(json.dumps(records))
    elif form == "jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        file.write_text("\ufeff" + "\n\n".join(lines) + "\r\n", encoding="utf-8")
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["width", path_field, caption_field])
            writer.writeheader()
            writer.writerows(records)
    dataset = load_dataset(tmp_path, None)
    assert dataset.rejected == ()
    assert dataset.origin == str(file)
    kind = {"video_path": ["video"] * 2, "image_path": ["image"] * 2}
    assert [(e.source, e.caption) for e in dataset.entries] == ROWS
    assert [e.type for e in dataset.entries] == kind.get(path_field, ["video", "auto"])


def test_a_table_with_a_column_for_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "list.CSV"
    file.write_text("video_path,image_path,caption\na.bin,,one\n,b.bin,two\nc.bin,d.bin,three\n")
    dataset = load_dataset(tmp_path, file)
    assert [(e.source, e.type) for e in dataset.entries] == [
        ("a.bin", "video"),
        ("b.bin", "image"),
    ]
    assert [(r.source, r.reason) for r in dataset.rejected] == [
        ("c.bin", "video_path and image_path are both given, expected one of them")
    ]


def test_a_bad_line_is_rejected_by_its_number_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = tmp_path / "metadata.jsonl"
    lines.write_text('{"file_path": "a.mp4", "text": "t"}\n\n{"file_path"\n[]\n')
    dataset = load_dataset(tmp_path, None)
    assert [e.source for e in dataset.entries] == ["a.mp4"]
    found = [(r.source, r.reason) for r in dataset.rejected]
    assert found[0][0] == "metadata.jsonl line 3" and found[0][1].startswith("not valid JSON (")
    assert found[1] == ("metadata.jsonl line 4", "the entry is a list, expected an object")

    table = tmp_path / "t.csv"
    table.write_text('file_path,text\na.mp4,"two\nlines"\nb.mp4,red, blue\n\nc.mp4\n,lost\n')
    dataset = load_dataset(tmp_path, table)
    assert [e.caption for e in dataset.entries] == ["two\nlines"]
    assert [(r.source, r.reason.split(";")[0]) for r in dataset.rejected] == [
        ("t.csv line 4", "3 fields, expected 2 as in the header"),
        ("t.csv line 6", "1 fields, expected 2 as in the header"),
        (
            "t.csv line 7",
            "no file_path or video_path or image_path or file_name, expected the path of a file",
        ),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "path,text\n", r"no path column: its first line names path, text\. Expected a "),
        ("m.csv", "video_path,prompt\n", r"no caption column: .* with text or caption or captions"),
        ("m.csv", "text,file_path,text\n", "a column occurs twice"),
        ("m.csv", 'file_path,text\na,"b"c\n', "line 2 is not valid CSV"),
        ("m.json", '{"a": 1}\n{"a": 2}\n', r"It looks like JSON lines: rename it to m\.jsonl"),
        ("m.parquet", "", r"ends in '\.parquet', expected \.json, \.jsonl or \.csv"),
        ("m", "", "has no ending, expected"),
        ("m.json", "[]", "lists nothing. Expected at least one entry"),
        ("m.jsonl", "\n", "lists nothing"),
        ("m.csv", "", "lists nothing"),
        ("m.csv", "file_path,text\n", "lists nothing"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_dataset(tmp_path, tmp_path / name)


def test_two_paths_are_refused_even_where_they_agree(tmp_path: Path) -> None:
    """As a video or as an image? A blank beside a path is none."""
    listed(
        tmp_path,
        {"video_path": "a.bin", "image_path": "a.bin", "text": "t"},
        {"file_path": "b.mp4", "file_name": "b.mp4", "text": "t"},
        {"video_path": " ", "image_path": "c.bin", "text": None, "caption": "t"},
    )
    dataset = load_dataset(tmp_path, None)
    assert [(e.source, e.type) for e in dataset.entries] == [("c.bin", "image")]
    assert [(r.source, r.reason.split(" are both")[0]) for r in dataset.rejected] == [
        ("a.bin", "video_path and image_path"),
        ("b.mp4", "file_path and file_name"),
    ]


def test_every_form_gives_the_same_shards(tiny_t2v: Path, tmp_path: Path) -> None:
    """Through `wanprep encode`: each member of each sample, to the byte."""
    data = tmp_path / "data"
    data.mkdir()
    render_clip(data / "a.mp4", height=64, width=96, frames=6)
    Image.new("RGB", (64, 64), (20, 130, 90)).save(data / "b.png")
    records = [{"file_path": path, "text": caption} for path, caption in ROWS]
    (tmp_path / "m.json").write_text(json.dumps(records))
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    with (tmp_path / "m.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([("file_path", "text"), *ROWS])
    contents = []
    for form in ("json", "jsonl", "csv"):
        shards = tmp_path / form
        ran = wanprep(
            "encode", "--model", tiny_t2v, "--train-data-dir", data, "--output", shards,
            "--train-data-meta", tmp_path / f"m.{form}", "--size", 64,
            "--video-sample-n-frames", 5, "--device", "cpu",
        )  # fmt: skip
        assert ran.code == 0, ran.err
        contents.append(Cache.open(shards).contents())
    assert contents[0] == contents[1] == contents[2]
    assert sum(name.endswith(".latents.safetensors") for name in contents[0]) == 2


def test_tags_go_into_the_shards(tiny_t2v: Path, tmp_path: Path) -> None:
    """From JSON and CSV; of a file that is listed twice, those of both; of a caption alone, too."""
    Image.new("RGB", (64, 64), (20, 130, 90)).save(tmp_path / "b.png")
    Image.new("RGB", (64, 64), (90, 20, 130)).save(tmp_path / "c.png")
    rows = [
        ("b.png", "one", "good, night,,good"), ("b.png", "two", "wide"), ("c.png", "three", " "),
    ]  # fmt: skip
    lists = [
        {"file_path": name, "text": text, "tags": [t for t in tags.split(",") if t.strip()]}
        for name, text, tags in rows
    ]
    lists[2]["tags"] = None
    (tmp_path / "m.json").write_text(json.dumps(lists))
    with (tmp_path / "m.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file_path", "text", "tags"), *rows])
    (tmp_path / "alone.json").write_text(json.dumps([{"text": "four", "tags": ["sea"]}]))
    for form in ("m.json", "m.csv", "alone.json"):
        ran = wanprep(
            "encode", "--model", tiny_t2v, "--train-data-dir", tmp_path, "--output",
            tmp_path / f"shards-{form}", "--train-data-meta", tmp_path / form, "--size", 64,
            "--video-sample-n-frames", 5, "--device", "cpu",
        )  # fmt: skip
        assert ran.code == 0, ran.err
        cache = Cache.open(tmp_path / f"shards-{form}")
        infos = [json.loads(v) for name, v in cache.contents().items() if name.endswith(".json")]
        tags = {info["caption"]: info["tags"] for info in infos}
        both = ["good", "night", "wide"]
        expected = {"one": both, "two": both, "three": []}
        assert tags == ({"four": ["sea"]} if form == "alone.json" else expected)


def test_differing_captions_are_refused_and_equal_ones_are_not(tmp_path: Path) -> None:
    listed(
        tmp_path,
        {"file_path": "a.mp4", "text": "one", "caption": "two"},
        {"file_path": "b.mp4", "text": "one", "caption": "one"},
        {"file_path": "c.mp4", "text": "", "caption": "one"},
    )
    dataset = load_dataset(tmp_path, None)
    assert [e.source for e in dataset.entries] == ["b.mp4", "c.mp4"]
    assert dataset.rejected[0].reason == "text and caption differ, expected one of them"
