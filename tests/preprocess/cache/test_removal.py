"""Samples leave a cache when someone says so, and only then; their room can be had back."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cache.index import build_index, fresh_index
from shared.cache.writer import ShardWriter
from shared.format.cache import committed_shards, committed_tombstones, open_cache
from shared.format.schema import Sample, SampleInfo, sample_key
from shared.io.store import Store
from tests.preprocess.conftest import Cache, Ran, wanprep

SETTINGS = ("--size", 64, "--dtype", "fp32", "--shard-size-mb", 1, "--device", "cpu")
PICTURES = [f"{number}-{part}.png" for number in (0, 1) for part in range(3)]


def encode(model: Path, data: Path, output: Path, *more: object) -> Ran:
    ran = wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--output", output),
        *(*SETTINGS, *more),
    )
    assert ran.code == 0, ran.err
    return ran


def sources(folder: Path) -> list[str]:
    cache = Cache.open(folder)
    return sorted(cache.info(row)["source"] for row in range(len(cache.index)))


@pytest.fixture
def data(pictures: Path, tmp_path: Path) -> Path:
    """Six pictures that a test may change."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in PICTURES:
        shutil.copy(pictures / name, folder)
        (folder / name).with_suffix(".txt").write_text(f"picture {name}")
    return folder


def test_prune_removes_what_the_dataset_does_not_give_any_more(
    data: Path, pictures: Path, tiny_i2v: Path, tmp_path: Path, count_calls: "Calls"
) -> None:
    output = tmp_path / "shards"
    encode(tiny_i2v, data, output)
    whole = Cache.open(output).contents()
    (data / "0-1.png").unlink()
    (data / "0-1.txt").unlink()
    (data / "1-2.txt").unlink()  # a file that can't be used today was not taken out

    ran = encode(tiny_i2v, data, output, "--max-bad", 1)
    assert "leftover 2 in the shards are not in this dataset" in ran.err
    assert "they stay and are trained on. To remove them: --prune" in ran.err
    assert Cache.open(output).contents() == whole

    ran = encode(tiny_i2v, data, output, "--prune", "--max-bad", 1)
    assert "1 sample removed" in ran.out and f"wanprep compact --shards {output}" in ran.out
    left = [name for name in PICTURES if name != "0-1.png"]
    assert sources(output) == left
    ran = encode(tiny_i2v, data, output, "--prune", "--max-bad", 1)
    assert "removed" not in ran.out and len(committed_tombstones(output)) == 1

    # From tars and tombstones alone, it is the same.
    shutil.rmtree(output / "index.zarr")
    (output / "manifest.json").unlink()
    assert wanprep("index", "--shards", output).code == 0
    assert sources(output) == left

    # Put back, it is encoded again, alone, and lives.
    shutil.copy(pictures / "0-1.png", data)
    for name in ("0-1", "1-2"):
        (data / f"{name}.txt").write_text(f"picture {name}.png")
    before = count_calls()["WanEncoder3d"]
    encode(tiny_i2v, data, output, "--prune")
    assert count_calls()["WanEncoder3d"] == before + 2  # it and the encoding of zeros
    assert Cache.open(output).contents() == whole


def test_remove_by_key_and_by_source(data: Path, tiny_i2v: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    encode(tiny_i2v, data, output)
    cache = Cache.open(output)
    key = cache.index.key(cache.row(source="1-1.png"))
    command = ("remove", "--shards", output, "--sample", "0-*", "--sample", key)

    before = cache.contents()
    ran = wanprep(*command, "--dry-run")
    assert ran.code == 0, ran.err
    assert "4 samples would be removed" in ran.out and f"{key}  1-1.png" in ran.out
    ran = wanprep(*command, "--sample", "nothing*")
    assert ran.code == 1 and "'nothing*' is no key and fits no source" in ran.err
    assert Cache.open(output).contents() == before

    ran = wanprep(*command)
    assert ran.code == 0, ran.err
    assert "4 samples removed, 2 left" in ran.out
    assert sources(output) == ["1-0.png", "1-2.png"]
    assert wanprep(*command).code == 1  # they are not there any more


def test_compact_gives_the_room_back_and_changes_nothing_else(
    data: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    encode(tiny_i2v, data, output)
    (data / "0-0.txt").write_text("edited")
    encode(tiny_i2v, data, output)
    assert wanprep("remove", "--shards", output, "--sample", "1-*").code == 0
    before = Cache.open(output).contents()
    assert len(before) == 3 * 4
    prompts = {p.name: p.read_bytes() for p in output.glob("prompts-*")}
    held = sum(path.stat().st_size for path in output.glob("h*.tar"))

    ran = wanprep("compact", "--shards", output)
    assert ran.code == 0, ran.err
    assert "4 dead samples dropped" in ran.out  # three removed, one replaced
    assert Cache.open(output).contents() == before
    assert {p.name: p.read_bytes() for p in output.glob("prompts-*")} == prompts
    shards = [s for s in committed_shards(output) if s.kind == "samples"]
    assert sum(shard.count for shard in shards) == 3
    assert not committed_tombstones(output)
    assert sum(path.stat().st_size for path in output.glob("h*.tar")) < held / 2
    for shard in shards:
        digest = hashlib.sha256((output / shard.shard).read_bytes()).hexdigest()
        assert digest == shard.sha256

    names = sorted(path.name for path in output.glob("*.tar"))
    ran = wanprep("compact", "--shards", output)
    assert "0 dead samples dropped, 0.0 MB freed" in ran.out
    assert sorted(path.name for path in output.glob("*.tar")) == names

    # Damage is not copied under a fresh checksum.
    victim = output / next(shard.shard for shard in shards if shard.count == 2)
    damaged = bytearray(victim.read_bytes())
    damaged[2000] ^= 1
    victim.write_bytes(damaged)
    assert wanprep("remove", "--shards", output, "--sample", "0-1.png").code == 0
    ran = wanprep("compact", "--shards", output)
    assert ran.code == 1 and f"{victim.name} is damaged" in ran.err


# Shards of fixed numbers: what the index makes of them.


def sample(number: int, caption: str) -> Sample:
    info = SampleInfo(
        caption=caption,
        type="image",
        source=f"{number}.png",
        width=16,
        height=16,
        frames=1,
        frame_indices=[0],
        fps=None,
        source_width=16,
        source_height=16,
    )
    return Sample(
        key=sample_key(f"{number:064x}", {"n": number}, 0),
        info=info,
        latents=torch.full((2, 1, 2, 2), float(number)),
        text=torch.ones(number + 1, 4),
    )


def write(folder: Path, *samples: Sample, writer: int = 0) -> None:
    """One run of a writer that makes one shard of each sample."""
    shards = ShardWriter(Store(folder), {"format": 1}, shard_bytes=1, writer=writer)
    for item in samples:
        shards.add(item)


def captions(folder: Path) -> dict[str, str]:
    """Source → caption of what lives: by an index brought up to date, which must be the same as
    one that is made anew from tars alone.
    """
    cache = Cache(folder, fresh_index(Store(folder)))
    found = {
        cache.info(row)["source"]: cache.info(row)["caption"] for row in range(len(cache.index))
    }
    updated = {name: values.tobytes() for name, values in cache.index.read_columns().items()}
    rebuilt = build_index(Store(folder))
    assert updated == {name: v.tobytes() for name, v in rebuilt.read_columns().items()}
    assert cache.index.digest == rebuilt.digest
    return found


def test_the_newest_word_about_a_key_counts(tmp_path: Path) -> None:
    first = sample(0, "first")
    write(tmp_path, first, sample(1, "other"), writer=1)
    assert captions(tmp_path) == {"0.png": "first", "1.png": "other"}
    # A later run of a writer with a lower number: younger all the same.
    write(tmp_path, sample(0, "second"))
    assert captions(tmp_path)["0.png"] == "second"
    ShardWriter(Store(tmp_path), {}, shard_bytes=1).add_tombstones([first.key])
    assert captions(tmp_path) == {"1.png": "other"}
    write(tmp_path, sample(0, "third"), writer=1)
    assert captions(tmp_path)["0.png"] == "third"
    # A shard that was deleted by hand: what it replaced is dead still, by the tombstone.
    newest = max(tmp_path.glob("h*.tar"), key=lambda path: path.stem.rpartition("-")[2])
    newest.unlink()
    assert captions(tmp_path) == {"1.png": "other"}
    # Its number is not given to another: a new shard is younger than every tombstone.
    for path in tmp_path.glob("h*"):
        path.unlink()
    write(tmp_path, sample(0, "fourth"))
    assert captions(tmp_path) == {"0.png": "fourth"}


def test_a_deleted_shard_brings_back_what_it_replaced(tmp_path: Path) -> None:
    write(tmp_path, sample(0, "old"), sample(1, "other"))
    write(tmp_path, sample(0, "new"))
    assert captions(tmp_path)["0.png"] == "new"
    (tmp_path / "h16-w16-f1-w000-00002.tar").unlink()
    (tmp_path / "h16-w16-f1-w000-00002.json").unlink()
    assert captions(tmp_path)["0.png"] == "old"


def test_only_new_shards_are_read_for_the_index(tmp_path: Path) -> None:
    """The tar of a known shard may be anything, as long as it is there: nobody looks into it."""
    write(tmp_path, sample(0, "a"), sample(1, "b"))
    build_index(Store(tmp_path))
    known = tmp_path / "h16-w16-f1-w000-00000.tar"
    whole = known.read_bytes()
    known.write_bytes(b"\0" * len(whole))
    write(tmp_path, sample(2, "c"))
    assert len(fresh_index(Store(tmp_path))) == 3
    known.write_bytes(whole)
    assert captions(tmp_path) == {"0.png": "a", "1.png": "b", "2.png": "c"}


def test_a_damaged_tombstone_is_refused(tmp_path: Path) -> None:
    """Taken for empty it would revive samples."""
    write(tmp_path, sample(0, "a"), sample(1, "b"))
    ShardWriter(Store(tmp_path), {}, shard_bytes=1).add_tombstones([sample(0, "").key])
    build_index(Store(tmp_path))
    (path,) = tmp_path.glob("tombstones-*.json")
    whole = path.read_text()
    for bad in (whole[:40], "[]", whole.replace('"keys"', '"kezs"'), whole.replace("[", '["x",')):
        path.write_text(bad)
        ran = wanprep("index", "--shards", tmp_path)
        assert ran.code == 1 and path.name in ran.err, bad
    path.write_text(whole)
    assert len(open_cache(Store(tmp_path))) == 1


Calls = Callable[[], dict[str, int]]
