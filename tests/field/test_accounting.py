"""In every reader: what lies in a dataset is used, rejected or left out, and all is counted."""

import io
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preprocess.dataset.entries import load_dataset
from preprocess.dataset.entry import Dataset
from preprocess.dataset.left_out import (
    FURTHER,
    HIDDEN,
    OTHER,
    POSTER,
    SPECIAL,
    STRAY_CAPTION,
    hidden_part,
)
from preprocess.dataset.toml_config import load_dataset_config
from shared.errors import UserError
from tests.preprocess.conftest import Cache, Ran, wanprep

Files = dict[str, bytes]
Counts = Counter[str]
"""By what becomes of things: used, rejected, left out."""

STEMS = ("plain", "Mr. Smith takes {n}", "take {n}.0 (clean)", "deep/er/a.b.c", "clip v1.2.3")
HIDDEN_PLACES = (
    *(".Trash-1000/files/", "$RECYCLE.BIN/", "#recycle/", "@Recycle/", ".ipynb_checkpoints/"),
    *("deep/@eaDir/x.mp4/", ".@__thumb/", "__MACOSX/", "deep/._", ".", ".git/objects/"),
)
SEEDS = range(8)


def thing(rng: random.Random, number: int, in_tar: bool) -> tuple[Files, Counts]:
    """Files that belong together, and what they should come to."""
    stem = f"{number:02d} {rng.choice(STEMS).format(n=number)}"
    video = rng.choice((".mp4", ".MOV", ".webm"))
    picture = rng.choice((".jpg", ".PNG", ".gif"))
    medium = rng.choice((video, picture))
    hidden = rng.choice(HIDDEN_PLACES) + stem
    kinds: list[tuple[Files, Counts]] = [
        ({stem + medium: b"x", stem + ".txt": b"a caption"}, Counts(used=1)),
        ({stem + medium: b"x"}, Counts(rejected=1)),
        ({stem + medium: b"x", stem + ".txt": "\ufeff\u200b\n".encode()}, Counts(rejected=1)),
        ({stem + medium: b"x", stem + ".txt": b"\xff\xfe"}, Counts(rejected=1)),
        ({f"{stem}.xyz": b"x", f"{stem}.txt": b"a caption"}, Counts(rejected=1)),
        ({f"{stem}.txt": b"a caption"}, Counts({"rejected" if in_tar else "left out": 1})),
        ({f"{stem}.md": b"x"}, Counts({"left out": 1})),
        ({hidden + medium: b"x", f"{hidden}.txt": b"t"}, Counts({"left out": 2})),
        (
            {stem + video: b"x", stem + picture: b"x", f"{stem}.txt": b"t"},
            Counts({"used": 1, "left out": 1}),
        ),
    ]
    if in_tar:
        sample = {stem + medium: b"x", f"{stem}.json": b'{"captions": ["one", "two"]}'}
        kinds += [
            (sample | {f"{stem}.cls": b"7", f"{stem}.cond.json": b"{}"}, Counts(used=1)),
            (sample | {f"{stem}.mask.png": b"x"}, Counts({"used": 1, "left out": 1})),
            (sample | {f"{stem}.2.txt": b"whose?"}, Counts({"used": 1, "left out": 1})),
        ]
    return rng.choice(kinds)


def mixture(seed: int, in_tar: bool) -> tuple[Files, Counts]:
    """Never without a sample."""
    rng = random.Random(seed)
    files: Files = {"first.mp4": b"x", "first.txt": b"a caption"}
    counts = Counts(used=1)
    for number in range(40):
        more, become = thing(rng, number, in_tar)
        files |= more
        counts += become
    return files, counts


def put(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def put_tar(tar: Path, files: Files, links: tuple[str, ...] = ()) -> Path:
    with tarfile.open(tar, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "first.mp4"
            archive.addfile(info)
    return tar


def counted(dataset: Dataset) -> Counts:
    """What the dataset says, if it agrees with what it holds."""
    sums = Counts()
    for tally in dataset.tallies:
        assert tally.found == tally.used + tally.rejected + tally.left_out
        sums += Counts(used=tally.used, rejected=tally.rejected)
        sums["left out"] += tally.left_out
    assert sums["used"] <= len(dataset.entries)  # more where a file has several captions
    assert sums["rejected"] == len(dataset.rejected)
    assert sums["left out"] == len(dataset.left_out)
    return +sums


@pytest.mark.parametrize("seed", SEEDS)
def test_a_folder_is_accounted_for(seed: int, tmp_path: Path) -> None:
    files, expected = mixture(seed, in_tar=False)
    dataset = load_dataset(put(tmp_path, files), None)
    assert counted(dataset) == expected
    assert len({entry.source for entry in dataset.entries}) == expected["used"]
    # A file is counted by itself, or is the caption of one that is.
    counted_files = [*dataset.entries, *dataset.rejected]
    captions = {f"{Path(one.source).with_suffix('')}.txt" for one in counted_files} & files.keys()
    assert len(files) == expected.total() + len(captions)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tar_is_accounted_for(seed: int, tmp_path: Path) -> None:
    files, expected = mixture(seed, in_tar=True)
    links = ("link.mp4", "other link")
    tar = put_tar(tmp_path / "a.tar", files, links)
    expected["left out"] += len(links)
    dataset = load_dataset(tar, None)
    assert counted(dataset) == expected
    reasons = Counter(one.reason for one in dataset.left_out)
    assert reasons[SPECIAL] == len(links)
    # In a folder with what img2dataset leaves beside: that is counted, too.
    put(tmp_path, {"a.parquet": b"PAR1", "a_stats.json": b"{}", ".a.tar": b"x"})
    expected["left out"] += 3
    assert counted(load_dataset(tmp_path, None)) == expected


ENTRIES: tuple[tuple[Any, str], ...] = (
    ({"file_path": "a.mp4", "text": "a caption"}, "used"),
    ({"file_path": "a.mp4", "text": ["one", "two"]}, "used"),
    ({"file_path": ".hidden/a.mp4", "text": "listed on purpose"}, "used"),
    ({"file_path": "a.mp4", "text": "\u200b\u00ad"}, "rejected"),
    ({"file_path": "a.mp4"}, "rejected"),
    ({"file_path": "a.xyz", "text": "t"}, "rejected"),
    ({"file_path": "gone\\a.mp4", "text": "t"}, "rejected"),
    ({"text": "no path"}, "rejected"),
)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "by path", "txt"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_list_is_accounted_for(form: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    drawn = [ENTRIES[0], *(rng.choice(ENTRIES) for _ in range(30))]
    records = [record for record, _ in drawn]
    expected = Counts(become for _, become in drawn)
    file = tmp_path / f"list.{'json' if form == 'by path' else form}"
    if form == "json":
        file.write_text(json.dumps(records))
    elif form == "jsonl":
        file.write_text("\n\n".join(map(json.dumps, records)) + "\n{torn\n")
        expected["rejected"] += 1
    elif form == "csv":
        lines = [
            f"{record.get('file_path', '')},{one}"
            for record in records
            for one in [record.get("text", "") if record.get("text") != ["one", "two"] else "two"]
        ]
        file.write_text("file_path,text\n" + "\n".join(lines) + "\ntoo,many,fields\n")
        expected["rejected"] += 1
    elif form == "by path":  # a path may come twice: JSON allows it
        pairs = [(r["file_path"], r) for r in records if "file_path" in r]
        expected = Counts(become for record, become in drawn if "file_path" in record)
        said = (f"{json.dumps(path)}: {json.dumps(r.get('text'))}" for path, r in pairs)
        file.write_text("{" + ", ".join(said) + "}")
    else:
        file.write_text("\n \u200b\n".join(["a caption"] * 30))
        expected = Counts(used=30)
    dataset = load_dataset(tmp_path, file)
    assert counted(dataset) == expected
    assert [tally.noun for tally in dataset.tallies] == ["record"]


def test_datasets_of_a_toml_file_are_accounted_for_each(tmp_path: Path) -> None:
    files, _ = mixture(1, in_tar=False)
    in_tar, of_tar = mixture(2, in_tar=True)
    put(tmp_path / "folder", files)
    put_tar(tmp_path / "t.tar", in_tar)
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(record) for record, _ in ENTRIES))
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nvideo_directory = "{tmp_path}/folder"\n'
        f'[[datasets]]\nimage_directory = "{tmp_path}/folder"\n'
        f'[[datasets]]\npath = "{tmp_path}/t.tar"\n'
        f'[[datasets]]\nmetadata = "{tmp_path}/l.jsonl"\n'
    )
    dataset = load_dataset_config(tmp_path / "d.toml")
    counted(dataset)
    videos, pictures, tar, listed = dataset.tallies
    # A medium is used or rejected in one, and left out in the other.
    assert videos.found == pictures.found
    reasons = Counter(one.reason for one in dataset.left_out)
    endings = (".mp4", ".mov", ".webm", ".jpg", ".png", ".gif")
    media = [name for name in files if name.lower().endswith(endings) and not hidden_part(name)]
    assert reasons["not videos"] + reasons["not images"] == len(media)
    assert Counts(used=tar.used, rejected=tar.rejected) + Counts({"left out": tar.left_out}) == (
        of_tar
    )
    assert (listed.found, listed.used) == (len(ENTRIES), 3)


def encoded(data: Path, output: Path, *more: object) -> Ran:
    return wanprep(
        *("encode", "--model", "toy", "--train-data-dir", data, "--size", 64, "--num-workers", 1),
        *("--output", output, *more),
    )


def real_picture(path: Path, shade: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (shade, 90, 30)).save(path)
    path.with_suffix(".txt").write_text(f"caption {shade}")
    return path.read_bytes()


def sources(shards: Path) -> set[str]:
    cache = Cache.open(shards)
    return {cache.info(row)["source"] for row in range(len(cache.index))}


def test_what_is_printed_adds_up_and_what_is_hidden_is_not_encoded(tmp_path: Path) -> None:
    """The dataset's own folder may be hidden, or lie in what is."""
    data = tmp_path / ".cache" / "@eaDir" / "data"
    real_picture(data / "keep.png", 1)
    real_picture(data / ".Trash-1000/files/deleted.png", 2)
    real_picture(data / ".ipynb_checkpoints/keep-checkpoint.png", 3)
    real_picture(data / "sub/@eaDir/thumb.png", 4)
    put(data, {"Thumbs.db": b"x", "sub/._keep.png": b"x", "notes.txt": b"x", "README.md": b"x",
               "lonely.mp4": b"x"})  # fmt: skip
    ran = encoded(data, tmp_path / "shards", "--max-bad", 1)
    assert ran.code == 0, ran.err
    assert sources(tmp_path / "shards") == {"keep.png"}
    assert f"dataset  {data}: 1 usable\n" in ran.err
    assert "found    12 files: 1 used, 1 rejected, 10 left out\n" in ran.err
    assert f"left out 8 ({HIDDEN}): " in ran.err and ".Trash-1000" in ran.err
    assert f"left out 1 ({STRAY_CAPTION}): notes.txt\n" in ran.err
    assert f"left out 1 ({OTHER}): README.md\n" in ran.err
    left = sum(int(number) for number in re.findall(r"left out (\d+) \(", ran.err))
    found = re.search(r"found +(\d+) files: (\d+) used, (\d+) rejected, (\d+) left out", ran.err)
    assert found is not None
    assert int(found[1]) == int(found[2]) + int(found[3]) + int(found[4]) and left == int(found[4])


def test_a_link_shows_what_lies_in_a_hidden_folder(tmp_path: Path) -> None:
    put(tmp_path / "data", {".store/a.mp4": b"x", ".store/a.txt": b"t", "b.mp4": b"x"})
    (tmp_path / "data/clips").symlink_to(".store")
    (tmp_path / "data/b.txt").write_text("t")
    dataset = load_dataset(tmp_path / "data", None)
    assert {entry.source for entry in dataset.entries} == {"b.mp4", "clips/a.mp4"}
    assert dataset.left_out == ()


def test_only_hidden_media_is_an_error_that_says_so(tmp_path: Path) -> None:
    put(tmp_path, {".Trash/a.mp4": b"x", ".Trash/a.txt": b"t"})
    with pytest.raises(UserError, match=r"no media .* but for 2 hidden files"):
        load_dataset(tmp_path, None)


def test_a_hidden_file_that_a_list_names_is_meant(tmp_path: Path) -> None:
    real_picture(tmp_path / ".thumbs/a.png", 1)
    (tmp_path / "metadata.json").write_text('[{"file_path": ".thumbs/a.png", "text": "t"}]')
    ran = encoded(tmp_path, tmp_path / "shards")
    assert ran.code == 0, ran.err
    assert sources(tmp_path / "shards") == {".thumbs/a.png"}
    assert "found    1 record: 1 used, 0 rejected, 0 left out\n" in ran.err


PUTS: dict[str, Callable[[Path, Files], Path]] = {
    "folder": put,
    "tar": lambda folder, files: put_tar(folder / "a.tar", files),
}


@pytest.mark.parametrize("reader", PUTS)
def test_of_a_video_and_its_poster_the_video_is_used(reader: str, tmp_path: Path) -> None:
    """A picture of the same name has no caption of its own. By itself, or asked for, it is one."""
    files = {"a.mp4": b"x", "a.jpg": b"x", "a.txt": b"t", "b.jpg": b"x", "b.txt": b"t"}
    data = PUTS[reader](tmp_path, files)
    dataset = load_dataset(data, None)
    assert [Path(entry.source).name for entry in dataset.entries] == ["a.mp4", "b.jpg"]
    assert [(Path(one.source).name, one.reason) for one in dataset.left_out] == [("a.jpg", POSTER)]
    pictures = load_dataset(data, None, kind="image")
    assert [Path(entry.source).name for entry in pictures.entries] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("reader", PUTS)
def test_names_with_dots(reader: str, tmp_path: Path) -> None:
    """Media and caption share their name up to the last dot, in tars as in folders."""
    names = ["Mr. Smith takes 1", "Mr. Smith takes 2", "take 2.0 (clean)", "v1.2/a.b", "plain"]
    files = {f"{name}{end}": name.encode() for name in names for end in (".mp4", ".txt")}
    dataset = load_dataset(PUTS[reader](tmp_path, files), None)
    assert dataset.rejected == () and dataset.left_out == ()
    found = {entry.caption: entry.source.removeprefix("a.tar/") for entry in dataset.entries}
    assert found == {name: f"{name}.mp4" for name in names}


def test_members_with_several_dots(tmp_path: Path) -> None:
    """WebDataset's own: they are of the sample whose name they begin with, and never read."""
    sample = {"000.jpg": b"x", "000.txt": b"t", "000.cond.json": b"{", "000.edge.npy": b"x"}
    masks = {
        "000.mask.png": b"x",
        "001.mask.png": b"x",
        "001.jpg": b"x",
        "001.json": b'{"text": "u"}',
    }
    tar = put_tar(tmp_path / "a.tar", sample | masks)
    dataset = load_dataset(tar, None)
    assert [(entry.source, entry.caption) for entry in dataset.entries] == [
        ("a.tar/000.jpg", "t"),
        ("a.tar/001.jpg", "u"),
    ]
    assert dataset.rejected == ()
    assert {(one.source, one.reason) for one in dataset.left_out} == {
        ("a.tar/000.mask.png", FURTHER),
        ("a.tar/001.mask.png", FURTHER),
    }
    # No such sample: nothing is guessed, and nothing is lost.
    apart = {"002.video.mp4": b"x", "002.txt": b"t", "several.jpg": b"x", "several.png": b"x"}
    dataset = load_dataset(put_tar(tmp_path / "b.tar", apart), None)
    assert dataset.entries == ()
    assert {one.source: one.reason.split(":")[0].split(" (")[0] for one in dataset.rejected} == {
        "b.tar/002.video": "no caption",
        "b.tar/002": "no media file",
        "b.tar/several.jpg": "several media",
        "b.tar/several.png": "several media",
    }


@pytest.mark.parametrize("reader", PUTS)
def test_captions_with_a_name_of_several_dots(reader: str, tmp_path: Path) -> None:
    files = {"a.b.mp4": b"x", "a.b.caption.txt": b"t", "a.b.txt": b"not this"}
    data = PUTS[reader](tmp_path, files)
    dataset = load_dataset(data, None, caption_suffix=".caption.txt")
    assert [entry.caption for entry in dataset.entries] == ["t"]
