"""WebDataset tars of media as the dataset: what a folder of their files gives; hostile ones."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from preprocess.dataset.entries import load_dataset
from preprocess.frames.media_info import MediaError
from preprocess.media.reader import probe
from preprocess.media.sources import TarMember, local_file
from preprocess.media.tars import base_folder, media_at, named_tars
from shared.errors import UserError
from shared.format.cache import open_cache
from shared.format.overlays import with_conditions
from shared.io.store import Store
from tests.preprocess.conftest import PICTURES, Cache, Ran, render_clip, wanprep

SETTINGS = (
    *("--size", 64, "--video-sample-n-frames", 5, "--video-sample-stride", 1),
    *("--device", "cpu", "--num-workers", 2),
)


def encode(model: Path, data: object, output: Path, *more: object) -> Ran:
    command = ("encode", "--model", model, "--train-data-dir", data, "--output", output)
    return wanprep(*command, *SETTINGS, *more)


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    """By webdataset's own writer, as img2dataset and video2dataset use it; values are bytes."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of two shapes, a photo, an animation; captions beside them."""
    folder = tmp_path_factory.mktemp("folder")
    render_clip(folder / "wide.mp4", height=48, width=96, frames=9)
    render_clip(folder / "tall.mp4", height=96, width=64, frames=6, seed=1)
    with Image.open(PICTURES / "chelsea.png") as cat:
        cat.convert("RGB").resize((120, 80)).save(folder / "cat.jpg")
    frames = [Image.new("RGB", (64, 40), (40 * n, 90, 200 - 30 * n)) for n in range(6)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"the file {path.name}")
    return folder


@pytest.fixture(scope="module")
def tars(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files in two tars: captions as .txt in one, as img2dataset's .json in the other."""
    output = tmp_path_factory.mktemp("tars")

    def sample(name: str, **more: bytes) -> dict[str, Any]:
        path = folder / name
        return {"__key__": path.stem, path.suffix[1:]: path.read_bytes(), **more}

    write_tar(
        output / "00000.tar",
        [
            sample("wide.mp4", txt=b"the file wide.mp4", cls=b"7", json=b'{"fps": 16}'),
            sample("cat.jpg", txt=b"the file cat.jpg", pickle=b"never read"),
        ],
    )
    write_tar(
        output / "00001.tar",
        [
            sample("tall.mp4", json=b'{"caption": "the file tall.mp4", "status": "success"}'),
            sample("moving.webp", json=b'{"text": "the file moving.webp"}'),
        ],
    )
    (output / "00000_stats.json").write_text('{"count": 2}')  # as img2dataset leaves them
    (output / "00000.parquet").write_bytes(b"PAR1")
    return output


@pytest.fixture(scope="module")
def encoded(folder: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `folder`."""
    output = tmp_path_factory.mktemp("encoded") / "shards"
    ran = encode(tiny_t2v, folder, output)
    assert ran.code == 0, ran.err
    return output


def without_sources(cache: Cache) -> dict[str, Any]:
    """Every member of every sample, `source` of `KEY.json` left out."""
    contents: dict[str, Any] = dict(cache.contents())
    for name, value in contents.items():
        if name.endswith(".json"):
            contents[name] = {k: v for k, v in json.loads(value).items() if k != "source"}
    return contents


def sources(cache: Cache) -> dict[str, str]:
    """Caption → source."""
    infos = [cache.info(row) for row in range(len(cache.index))]
    return {info["caption"]: info["source"] for info in infos}


def test_tars_give_what_their_files_give(
    encoded: Path,
    tars: Path,
    tiny_t2v: Path,
    tmp_path: Path,
    count_calls: Callable[[], dict[str, int]],
) -> None:
    pattern = "{00000..00001}.tar"
    ran = encode(tiny_t2v, tars / pattern, tmp_path / "new")
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "new")
    assert without_sources(cache) == without_sources(Cache.open(encoded))
    assert sources(cache) == {
        "the file wide.mp4": "00000.tar/wide.mp4",
        "the file cat.jpg": "00000.tar/cat.jpg",
        "the file tall.mp4": "00001.tar/tall.mp4",
        "the file moving.webp": "00001.tar/moving.webp",
    }
    done = count_calls()
    again = encode(tiny_t2v, tars / pattern, tmp_path / "new")
    assert "nothing to do" in again.out and count_calls() == done
    # The same content is the same sample, whether in a tar or not; however the tars are named.
    mixed = shutil.copytree(encoded, tmp_path / "mixed")
    assert "nothing to do" in encode(tiny_t2v, tars / "*.tar", mixed).out
    named = load_dataset(tars / pattern, None)
    for other in (tars, tars / "*.tar"):
        assert load_dataset(other, None).entries == named.entries


def test_a_tar_that_changes(folder: Path, tars: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    """Another tar of the same name: only what it changes is encoded. Unreadable: nothing goes."""
    data = Path(shutil.copytree(tars, tmp_path / "tars"))
    assert encode(tiny_t2v, data, tmp_path / "s").code == 0
    before = Cache.open(tmp_path / "s").contents()
    tall, new = ((folder / name).read_bytes() for name in ("tall.mp4", "cat.jpg"))
    new += b"\0"  # the same picture, another content
    write_tar(
        data / "00001.tar",
        [
            {"__key__": "tall", "mp4": tall, "txt": b"another caption"},
            {"__key__": "more/new", "jpg": new, "txt": b"new"},
        ],
    )
    ran = encode(tiny_t2v, data, tmp_path / "s", "--prune")
    assert ran.code == 0 and "1 sample removed" in ran.out, ran.err + ran.out
    after = Cache.open(tmp_path / "s")
    assert set(sources(after)) == {
        *("the file wide.mp4", "the file cat.jpg", "another caption", "new"),
    }
    kept = {name: data for name, data in before.items() if name.endswith("latents.safetensors")}
    assert sum(kept.get(name) == data for name, data in after.contents().items()) == 3

    (data / "00001.tar").write_bytes((data / "00001.tar").read_bytes()[:2000])
    ran = encode(tiny_t2v, data, tmp_path / "s", "--prune", "--max-bad", 1)
    assert ran.code == 0 and "00001.tar: the tar ends inside tall.mp4: it is truncated" in ran.err
    assert Cache.open(tmp_path / "s").contents() == after.contents()


def test_recaption_and_add_condition_find_what_lies_in_tars(
    tars: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    pattern = tars / "{00000..00001}.tar"
    assert encode(tiny_t2v, pattern, shards).code == 0
    command = ("--shards", shards, "--device", "cpu", "--train-data-dir", pattern)
    ran = wanprep("add-condition", "--model", tiny_i2v, *command)
    assert ran.code == 0, ran.err
    assert encode(tiny_i2v, tars, tmp_path / "i2v").code == 0
    direct = Cache.open(tmp_path / "i2v")
    added = with_conditions(open_cache(Store(shards)), "m")
    for row in range(len(added)):
        path, offset, length = added.place(row, "cond.safetensors")
        own = path.read_bytes()[offset : offset + length]
        assert length and own == direct.raw(row, "cond.safetensors")

    lines = [{"file_path": f"{source}", "text": "new"} for source in sources(direct).values()]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ran = wanprep(
        *("recaption", "--model", tiny_t2v, *command, "--name", "new"),
        *("--train-data-meta", tmp_path / "new.jsonl"),
    )
    assert ran.code == 0 and "without" not in ran.out, ran.err + ran.out
    # The same list encodes, too: its paths lead into the tars.
    ran = encode(tiny_t2v, pattern, tmp_path / "l", "--train-data-meta", tmp_path / "new.jsonl")
    assert ran.code == 0, ran.err
    listed = Cache.open(tmp_path / "l")
    assert [listed.index.key(r) for r in range(4)] == [direct.index.key(r) for r in range(4)]


def test_in_a_file_of_datasets(tars: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    """A pattern, with one kind of media and sizes of its own."""
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nvideo_directory = "{tars}/{{00000..00001}}.tar"\nnum_repeats = 3\n'
        f'[[datasets]]\nimage_directory = "{tars}"\nresolution = 96\n'
    )
    ran = wanprep(
        *("encode", "--model", tiny_t2v, "--dataset-config", tmp_path / "d.toml"),
        *("--output", tmp_path / "s", *SETTINGS),
    )
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "s")
    infos = [cache.info(row) for row in range(len(cache.index))]
    assert sorted((i["source"], i["type"], i.get("repeats", 1)) for i in infos) == [
        (f"{tars}/00000.tar/cat.jpg", "image", 1),
        (f"{tars}/00000.tar/wide.mp4", "video", 3),
        (f"{tars}/00001.tar/moving.webp", "image", 1),  # as in folders: WebP counts as an image
        (f"{tars}/00001.tar/tall.mp4", "video", 3),
    ]


def loaded(path: Path, **options: Any) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(source, caption) of the entries; source → reason of what is rejected."""
    dataset = load_dataset(path, None, **options)
    rejected = {one.source: one.reason for one in dataset.rejected}
    return [(entry.source, entry.caption) for entry in dataset.entries], rejected


def test_which_members_count(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            {"__key__": "txt-first", "jpg": b"x", "txt": b"one\n", "json": b'{"caption": "two"}'},
            {"__key__": "deep/er/UPPER", "MP4": b"x", "json": b'{"text": "upper"}'},
            {"__key__": "several", "png": b"x", "json": b'{"captions": ["one", "two"]}'},
            {"__key__": "both", "mp4": b"x", "jpg": b"x", "txt": b"t"},
            {"__key__": "dots", "v2.mp4": b"x", "v2.txt": b"t", "txt": b"t"},
            {"__key__": "no-caption", "mp4": b"x"},
            {"__key__": "null", "mp4": b"x", "json": b'{"caption": null}'},
            {"__key__": "blank", "mp4": b"x", "txt": b"  \n"},
            {"__key__": "latin", "mp4": b"x", "txt": b"\xff\xfe"},
            {"__key__": "list", "mp4": b"x", "json": b"[]"},
            {"__key__": "torn", "mp4": b"x", "json": b'{"a":'},
            {"__key__": "long", "mp4": b"x", "txt": b"t" * (5 << 20)},
            {"__key__": "README", "md": b"about"},
        ],
    )
    entries, rejected = loaded(tmp_path)
    assert entries == [
        ("a.tar/txt-first.jpg", "one"),
        ("a.tar/deep/er/UPPER.MP4", "upper"),
        ("a.tar/several.png", "one"),
        ("a.tar/several.png", "two"),
        ("a.tar/both.mp4", "t"),
        ("a.tar/dots.v2.mp4", "t"),
    ]
    starts = {
        "dots": "no media file (.mp4, .jpg, …) among its members: txt. Links",
        "no-caption": "no caption: no txt and no json beside the media file",
        "null": "caption is null, expected the caption",
        "blank": "the caption is empty",
        "latin": "the caption in txt is not UTF-8 text",
        "list": "json holds a list, expected an object",
        "torn": "the caption in json is not JSON",
        "long": "txt has 5242880 bytes, too many for a caption",
    }
    assert rejected.keys() == {f"a.tar/{key}" for key in starts}
    for key, start in starts.items():
        assert rejected[f"a.tar/{key}"].startswith(start), rejected
    # One kind of media chosen, and captions of another name.
    entries, rejected = loaded(tmp_path, kind="image")
    assert ("a.tar/both.jpg", "t") in entries and "a.tar/both" not in rejected
    assert not any(name.endswith(".mp4") for name, _ in entries)


def test_other_caption_members(tmp_path: Path) -> None:
    sample = {"__key__": "a", "mp4": b"x", "prompt": b"this", "txt": b"not this"}
    write_tar(tmp_path / "a.tar", [sample])
    assert loaded(tmp_path, caption_suffix=".prompt")[0] == [("a.tar/a.mp4", "this")]


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch exploded",))


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **header: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def test_a_hostile_tar(
    folder: Path, tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles, links, absolute names, `..`, names twice: nothing runs, nothing is written."""
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(data)
    (tmp_path / "secret.png").write_bytes((PICTURES / "astronaut.png").read_bytes())
    wide = (folder / "wide.mp4").read_bytes()
    bomb = pickle.dumps(_Bomb())
    with tarfile.open(data / "bad.tar", "w") as archive:
        add(archive, "../../up.mp4", wide)
        add(archive, "../../up.txt", b"up")
        add(archive, "/abs/x.mp4", wide)
        add(archive, "/abs/x.txt", b"abs")
        for ending in ("mp4", "txt", "json", "pyd", "pickle", "pth"):
            add(archive, f"bomb.{ending}", bomb)
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.png"))
        add(archive, "link.txt", b"a link")
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
        add(archive, "hard.txt", b"a hard link")
        add(archive, "twice.mp4", wide)
        add(archive, "twice.mp4", wide)
        add(archive, "twice.txt", b"twice")
        add(archive, "dir.mp4", type=tarfile.DIRTYPE)
        add(archive, "fifo.mp4", type=tarfile.FIFOTYPE)
        add(archive, "text.mp4", b"no video at all")
        add(archive, "text.txt", b"text")
        add(archive, "empty.mp4")
        add(archive, "empty.txt", b"empty")
        add(archive, b"\xff\xe9.mp4".decode(errors="surrogateescape"), wide)
        add(archive, b"\xff\xe9.txt".decode(errors="surrogateescape"), b"bytes")
    there = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    output = tmp_path / "s"
    ran = encode(tiny_t2v, data, output)
    assert ran.code == 1 and "Traceback" not in ran.err
    new = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} - there
    assert {path.parts[0] for path in new} == {"s"}
    lines = (output / "rejected.jsonl").read_text().splitlines()
    rejected = {line["source"]: line["reason"] for line in map(json.loads, lines)}
    starts = {
        "bad.tar/bomb": "the caption in txt is not UTF-8 text",
        "bad.tar/link": "no media file",
        "bad.tar/hard": "no media file",
        "bad.tar/twice": "twice.mp4 occurs twice in the tar",
        "bad.tar/text.mp4": f"{data}/bad.tar/text.mp4: cannot decode the video",
        "bad.tar/empty.mp4": f"{data}/bad.tar/empty.mp4: the file is empty (0 bytes)",
    }
    assert rejected.keys() == starts.keys()
    for source, start in starts.items():
        assert rejected[source].startswith(start), rejected[source]
        assert "/proc/" not in rejected[source]
    # Four names for one content, three captions: three samples of the one clip.
    cache = Cache.open(output)
    assert set(sources(cache)) == {"up", "abs", "bytes"}


def test_damaged_tars(folder: Path, tmp_path: Path) -> None:
    """What comes before the damage is used, the tar is named with what is wrong with it."""
    samples = [
        {"__key__": name, "mp4": (folder / f"{name}.mp4").read_bytes(), "txt": name.encode()}
        for name in ("wide", "tall")
    ]
    whole = write_tar(tmp_path / "whole.tar", samples).read_bytes()
    second = whole.index(b"tall.mp4")
    cuts = {
        "cut-data.tar": whole[: second + 600],
        "cut-header.tar": whole[: second + 100],
        "broken-header.tar": whole[:second] + b"\xff" * 512 + whole[second + 512 :],
        "no-tar.tar": b"this is no tar at all " * 100,
        "empty.tar": b"",
    }
    data = tmp_path / "data"
    data.mkdir()
    for name, content in cuts.items():
        (data / name).write_bytes(content)
    shutil.copy(tmp_path / "whole.tar", data / "ok.tar")
    entries, rejected = loaded(data)
    usable = {"cut-data.tar", "cut-header.tar", "broken-header.tar"}
    assert {source for source, _ in entries} == {
        *(f"{tar}/wide.mp4" for tar in usable),
        *("ok.tar/wide.mp4", "ok.tar/tall.mp4"),
    }
    assert rejected.keys() == cuts.keys()
    assert "truncated" in rejected["cut-data.tar"]
    assert all("damaged" in rejected[name] for name in cuts if name != "cut-data.tar"), rejected


@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_a_size_below_zero_does_not_lead_back(kind: bytes, tmp_path: Path) -> None:
    """Python's own reader goes round in circles there (CVE-2025-8194)."""
    write_tar(
        tmp_path / "a.tar", [{"__key__": n, "mp4": b"x" * 99, "txt": b"t"} for n in ("one", "two")]
    )
    content = bytearray((tmp_path / "a.tar").read_bytes())
    header = content.index(b"two.mp4") // 512 * 512
    content[header + 124 : header + 136] = b"\xff" * 10 + b"\xf8\x00"  # −2048
    content[header + 156 : header + 157] = kind
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    (tmp_path / "a.tar").write_bytes(content)
    entries, rejected = loaded(tmp_path)
    assert entries == [("a.tar/one.mp4", "t")]
    assert rejected["a.tar"].endswith("(a size below zero)")


def test_a_tar_that_shrinks_while_it_is_read(tars: Path, tmp_path: Path) -> None:
    tar = Path(shutil.copy(tars / "00001.tar", tmp_path / "a.tar"))
    member = media_at(tar / "tall.mp4")
    assert isinstance(member, TarMember)
    with local_file(member) as path:
        assert probe(path, "video").frames == 6
    tar.write_bytes(tar.read_bytes()[: member.offset + 10])
    reason = r"a\.tar/tall\.mp4: the tar ends \d+ bytes before"
    with pytest.raises(MediaError, match=reason), local_file(member):
        pass
    assert isinstance(media_at(tar / "not-there.mp4"), Path)


def test_no_copy_is_left(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is read: the copy has no name."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with local_file(media_at(tars / "00000.tar/cat.jpg")) as path:
        assert list(tmp_path.iterdir()) == []
        assert np.asarray(Image.open(path)).shape == (80, 120, 3)
    assert not path.exists()


def test_compressed_tars_and_gaps_in_a_pattern_are_named(tars: Path, tmp_path: Path) -> None:
    shutil.copy(tars / "00000.tar", tmp_path / "0.tar")
    with tarfile.open(tmp_path / "1.tar.gz", "w:gz") as archive:
        add(archive, "a.mp4", b"x")
    entries, rejected = loaded(tmp_path)
    assert len(entries) == 2 and "gunzip" in rejected["1.tar.gz"]
    entries, rejected = loaded(tmp_path / "{0..2}.tar")
    assert len(entries) == 2
    assert rejected == {"1.tar": "there is no such file", "2.tar": "there is no such file"}


def test_patterns(tmp_path: Path) -> None:
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in named_tars(tmp_path / "{b,a}/*.tar")]
    assert names == ["b/0.tar", "a/0.tar", "a/1.tar"]
    assert base_folder(tmp_path / "{b,a}/*.tar") == tmp_path
    assert base_folder(Path("x.tar")) == Path()
    with pytest.raises(UserError, match=r"no tar fits .*/c\*\.tar"):
        named_tars(tmp_path / "c*.tar")
    with pytest.raises(UserError, match="braces that don't fit"):
        named_tars(tmp_path / "{0..1.tar")


def test_shards_of_wandistill_below_the_data_are_no_dataset(
    folder: Path, encoded: Path, tars: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    shutil.copytree(encoded, data / "shards")
    assert len(load_dataset(data, None).entries) == 4
    shutil.copy(tars / "00000.tar", data)
    with pytest.raises(UserError, match=r"holds media \(cat\.jpg\) and tars \(00000\.tar\)"):
        load_dataset(data, None)
