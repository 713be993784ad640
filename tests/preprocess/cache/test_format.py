"""The shards as `shards/README.md` specifies them, read with other people's tools."""

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
import zarr

from preprocess.cache.index import build_index
from preprocess.cache.writer import ShardWriter
from shared.format.cache import COLUMNS, Sidecar, committed_shards, open_cache
from shared.format.columns import OPTIONAL, caption_digest
from shared.format.prompts import Prompt
from shared.format.schema import MEMBERS, Sample, SampleInfo, sample_key
from shared.io.store import Store
from tests.preprocess.conftest import (
    PHOTOS,
    REPOSITORY,
    Cache,
    render_clip,
    wanprep,
    write_metadata,
)


@pytest.fixture(scope="module")
def cache(tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two videos and a photo (with two captions), in three buckets."""
    data = tmp_path_factory.mktemp("data")
    output = tmp_path_factory.mktemp("format") / "shards"
    render_clip(data / "wide.mp4", height=64, width=112, frames=12)
    render_clip(data / "tall.mp4", height=112, width=64, frames=20, seed=1)
    shutil.copy(PHOTOS / "flower.jpg", data)
    texts = {"wide.mp4": "wide", "tall.mp4": "tall"}
    entries = [{"file_path": name, "text": text} for name, text in texts.items()]
    entries += [{"file_path": "flower.jpg", "text": f"flower {n}"} for n in range(2)]
    write_metadata(data, entries)
    ran = wanprep(
        *("encode", "--model", tiny_i2v, "--train-data-dir", data, "--output", output),
        *("--size", 96, "--video-sample-n-frames", 9, "--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    return Cache.open(output)


def test_plain_webdataset_reads_the_shards(cache: Cache) -> None:
    urls = [str(cache.folder / name) for name in cache.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(s["__key__"] for s in samples) == [cache.index.key(r) for r in range(4)]
    for sample in samples:
        assert {name for name in sample if not name.startswith("__")} == set(MEMBERS[:4])
        info = json.loads(sample["json"])
        height, width, frames = info["height"], info["width"], info["frames"]
        shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
        for name in ("latents", "cond"):
            tensor = safetensors.torch.load(sample[f"{name}.safetensors"])[name]
            assert tensor.dtype == torch.bfloat16 and tensor.shape == shape


def test_plain_tar_reads_the_shards(cache: Cache, tmp_path: Path) -> None:
    for name in cache.index.shards:
        subprocess.run(["tar", "-xf", cache.folder / name, "-C", tmp_path], check=True)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == cache.contents()
    for name, data in files.items():
        if name.endswith(".json"):
            json.loads(data)
        else:
            safetensors.torch.load(data)  # refuses anything else, pickles above all


def test_members_keep_their_order_and_headers_say_nothing_of_here_and_now(cache: Cache) -> None:
    with tarfile.open(cache.folder / cache.index.shards[0]) as tar:
        members = tar.getmembers()
    assert [m.name.partition(".")[2] for m in members[:4]] == list(MEMBERS[:4])
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "root", "root", 0o644)
    }


def test_sidecars_are_true(cache: Cache) -> None:
    for sidecar in committed_shards(cache.folder):
        tar = cache.folder / sidecar.shard
        data = tar.read_bytes()
        assert sidecar.sha256 == hashlib.sha256(data).hexdigest()
        assert sidecar.bytes == len(data)
        with tarfile.open(tar) as opened:
            keys = {name.partition(".")[0] for name in opened.getnames()}
        assert sidecar.count == len(keys)
        assert Sidecar.read(Sidecar.path_for(tar)) == sidecar


def test_the_index_has_the_specified_columns(cache: Cache) -> None:
    group = zarr.open_group(cache.folder / "index.zarr", mode="r")
    assert set(group.array_keys()) == COLUMNS.keys() - set(OPTIONAL)
    for name in group.array_keys():
        dtype, per_row = COLUMNS[name]
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (str(array.dtype), array.shape) == (dtype, (4, *per_row))
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    shards = [[s.shard, s.sha256] for s in committed_shards(cache.folder)]
    canonical = json.dumps([1, shards], separators=(",", ":")).encode()
    assert manifest["index"] == group.attrs["digest"] == hashlib.sha256(canonical).hexdigest()
    assert [b["samples"] for b in manifest["buckets"]] == [2, 1, 1]

    keys = [cache.index.key(row) for row in range(4)]
    assert keys == sorted(keys)
    for row in range(4):
        info = cache.info(row)
        assert bytes(cache.index.captions[row]) == caption_digest(info["caption"])
        assert cache.index.types[row] == {"video": 0, "image": 1}[info["type"]]
        assert cache.index.tokens[row] == len(cache.tensor(row, "text"))
        bucket = cache.index.buckets[cache.index.bucket_ids[row]]
        assert (bucket.height, bucket.width, bucket.frames) == (
            info["height"],
            info["width"],
            info["frames"],
        )


def test_a_key_follows_from_content(cache: Cache) -> None:
    row = cache.row(source="flower.jpg", caption="flower 1")
    info = cache.info(row)
    content = hashlib.sha256((PHOTOS / "flower.jpg").read_bytes()).hexdigest()
    transform = {"frames": [0], "size": [info["height"], info["width"]]}
    canonical = json.dumps([content, transform, 1], sort_keys=True, separators=(",", ":"))
    assert cache.index.key(row) == hashlib.sha256(canonical.encode()).hexdigest()[:32]


def test_the_snippet_in_the_specification_runs(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (REPOSITORY / "shards" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(cache.folder.parent)
    names: dict[str, object] = {}
    exec(snippet[1], names)
    samples = names["samples"]
    assert isinstance(samples, dict) and len(samples) == 4
    for row in range(4):
        info, latents, text = samples[cache.index.key(row)]
        assert info == cache.info(row)
        assert torch.equal(latents, cache.tensor(row, "latents"))
        assert text.shape == (512, 32)
    model_input = names["model_input"]
    assert isinstance(model_input, torch.Tensor) and model_input.shape[0] == 36


def test_the_specification_names_every_fingerprint_field(cache: Cache) -> None:
    readme = (REPOSITORY / "shards" / "README.md").read_text()
    table = readme.split("## The fingerprint")[1]
    for group, fields in cache.index.fingerprint.items():
        assert f"`{group}" in table
        for field in fields if isinstance(fields, dict) else ():
            assert f".{field}`" in table, f"{group}.{field}"


# Shards made of fixed numbers.


def fixed_sample(number: int, caption: str) -> Sample:
    numbers = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2) + number
    info = SampleInfo(
        caption=caption,
        type="video",
        source=f"{number}.mp4",
        width=16,
        height=16,
        frames=9,
        frame_indices=list(range(9)),
        fps=16.0,
        source_width=20,
        source_height=18,
    )
    return Sample(
        key=sample_key(f"{number:064x}", {"n": number}, 0),
        info=info,
        latents=numbers.to(torch.bfloat16),
        text=torch.ones(number + 1, 4, dtype=torch.bfloat16),
    )


def test_shard_bytes_are_pinned(tmp_path: Path) -> None:
    """Golden: shards that people have must stay byte-equal to what we would write, or the
    documents of other readers are wrong. A change here is a new format version.
    """
    writer = ShardWriter(Store(tmp_path), {"format": 1}, shard_bytes=10**9)
    for number in range(2):
        writer.add(fixed_sample(number, f"caption {number}"))
    writer.close()
    (sidecar,) = committed_shards(tmp_path)
    assert sidecar.shard == "h16-w16-f9-w000-00000.tar"
    assert sidecar.sha256 == "e49f4165479aff3513abe69bd085f637cab7c7e30ddbcfe0f5415170915f7bb8"


def test_a_full_shard_is_closed_and_numbers_go_on(tmp_path: Path) -> None:
    writer = ShardWriter(Store(tmp_path), {}, shard_bytes=1)
    writer.add_prompts([Prompt("empty", "", torch.ones(1, 4))])
    for number in range(2):
        writer.add(fixed_sample(number, "c"))
    writer.close()
    ShardWriter(Store(tmp_path), {}, shard_bytes=1).add(fixed_sample(5, "c"))
    assert [s.shard for s in committed_shards(tmp_path)] == [
        "h16-w16-f9-w000-00001.tar",
        "h16-w16-f9-w000-00002.tar",
        "h16-w16-f9-w000-00003.tar",
        "prompts-w000-00000.tar",
    ]
    assert len(build_index(Store(tmp_path))) == 3


def test_the_last_shard_of_a_key_counts(tmp_path: Path) -> None:
    for caption in ("old", "new"):
        writer = ShardWriter(Store(tmp_path), {}, shard_bytes=1)
        writer.add(fixed_sample(0, caption))
    index = build_index(Store(tmp_path))
    assert len(index) == 1
    assert bytes(index.captions[0]) == caption_digest("new")
    assert json.loads((tmp_path / "manifest.json").read_text())["buckets"][0]["samples"] == 1


def test_no_samples_at_all_is_a_cache(tmp_path: Path) -> None:
    assert len(build_index(Store(tmp_path))) == 0
    index = open_cache(Store(tmp_path))
    assert index.keys.shape == (0, 16) and index.offsets.shape == (0, len(MEMBERS))
    ran = wanprep("index", "--shards", tmp_path)  # a folder without any shard is a wrong folder
    assert ran.code == 1 and "no shards in" in ran.err


def test_rows_do_not_depend_on_how_samples_were_cut_into_shards(tmp_path: Path) -> None:
    columns = []
    for name, order, size in (("a", (0, 1, 2), 1), ("b", (2, 0, 1), 10**9)):
        folder = tmp_path / name
        folder.mkdir()
        writer = ShardWriter(Store(folder), {}, shard_bytes=size)
        for number in order:
            writer.add(fixed_sample(number, f"caption {number}"))
        writer.close()
        columns.append(build_index(Store(folder)))
    one, other = columns
    assert np.array_equal(one.keys, other.keys)
    assert np.array_equal(one.captions, other.captions)
    assert np.array_equal(one.tokens, other.tokens)
