"""Opening a cache that is not in order says what to run."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from shared.cache.index import build_index
from shared.cache.writer import ShardWriter
from shared.errors import UserError
from shared.format.cache import MemberReader, open_cache
from shared.format.prompts import Prompt, read_prompts
from shared.format.schema import (
    CONDITION_MEMBER,
    LATENTS_MEMBER,
    MEMBERS,
    TEXT_MEMBER,
    Sample,
    SampleInfo,
    sample_key,
)
from shared.io.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of three samples in as many shards, and two prompts."""
    writer = ShardWriter(Store(tmp_path), {"format": 1}, shard_bytes=1)
    writer.add_prompts(
        [Prompt("empty", "", torch.zeros(1, 4)), Prompt("negative", "ugly", torch.ones(2, 4))]
    )
    for number in range(3):
        info = SampleInfo(
            caption=f"c{number}",
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
        writer.add(
            Sample(
                key=sample_key(str(number), {}, 0),
                info=info,
                latents=torch.full((2, 1, 2, 2), float(number)),
                text=torch.ones(number + 1, 4),
                cond=torch.full((2, 1, 2, 2), -1.0) if number else None,
            )
        )
    build_index(Store(tmp_path))
    return tmp_path


def test_members_come_back(folder: Path) -> None:
    index = open_cache(Store(folder))
    reader = MemberReader(index, open_files=1)  # every read opens another file
    by_key = {index.key(row): row for row in range(len(index))}
    for _ in range(2):
        for number in range(3):
            row = by_key[sample_key(str(number), {}, 0)]
            latents = reader.read(row, LATENTS_MEMBER)
            assert latents is not None and (latents["latents"] == number).all()
            condition = reader.read(row, "cond.safetensors")
            assert (condition is None) == (number == 0)
            assert index.tokens[row] == number + 1
    reader.close()


def test_the_prompt_bank_comes_back_oldest_first(folder: Path) -> None:
    ShardWriter(Store(folder), {"format": 1}, shard_bytes=1).add_prompts(
        [Prompt("negative", "uglier", torch.ones(3, 4))]
    )
    prompts = read_prompts(Store(folder), build_index(Store(folder)).prompt_shards)
    assert [(p.role, p.prompt, len(p.text)) for p in prompts] == [
        ("empty", "", 1),
        ("negative", "ugly", 2),
        ("negative", "uglier", 3),
    ]


def test_a_damaged_prompt_bank_is_named(folder: Path) -> None:
    (name,) = open_cache(Store(folder)).prompt_shards
    whole = (folder / name).read_bytes()
    for bad in (whole[:700], whole[:1500], b"x" * 2000):
        (folder / name).write_bytes(bad)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read_prompts(Store(folder), (name,))
    (folder / name).write_bytes(whole)
    assert len(read_prompts(Store(folder), (name,))) == 2


def test_a_folder_without_a_cache(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="wanprep encode --size 640 --output"):
        open_cache(Store(tmp_path / "none"))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json. Rebuild it: wanprep index"):
        open_cache(Store(folder))


def test_an_index_that_does_not_belong_to_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"index": "00"}))
    with pytest.raises(UserError, match=r"does not belong to manifest\.json"):
        open_cache(Store(folder))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UserError, match="format version 2"):
        open_cache(Store(folder))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "index.zarr")
    with pytest.raises(UserError, match=r"index\.zarr is missing or damaged"):
        open_cache(Store(folder))


def test_a_shard_that_is_gone(folder: Path) -> None:
    name = open_cache(Store(folder)).shards[1]
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"1 shard.* gone, the first {name}"):
        open_cache(Store(folder))
    assert len(build_index(Store(folder))) == 2


def test_damaged_bytes_name_the_sample(folder: Path) -> None:
    index = open_cache(Store(folder))
    shard = folder / index.shards[index.shard_ids[0]]
    data = bytearray(shard.read_bytes())
    start = int(index.offsets[0, MEMBERS.index(LATENTS_MEMBER)])
    data[start : start + 16] = b"\xff" * 16
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{index.key(0)}: {LATENTS_MEMBER} is damaged"):
        MemberReader(index).read(0, LATENTS_MEMBER)


def test_tensors_are_read_where_they_are_wanted(folder: Path) -> None:
    index = open_cache(Store(folder))
    reader = MemberReader(index)
    for row in range(len(index)):
        whole = torch.full((3, 2, 1, 2, 2), 7.0)

        header = reader.header(row, LATENTS_MEMBER)
        assert header is not None and header.tensors["latents"].shape == (2, 1, 2, 2)
        reader.read_into(header, "latents", whole[1])
        expected = reader.read(row, LATENTS_MEMBER)
        assert expected is not None and torch.equal(whole[1], expected["latents"])
        assert (whole[0] == 7).all() and (whole[2] == 7).all()
    lacking = [row for row in range(len(index)) if reader.read(row, CONDITION_MEMBER) is None]
    assert lacking and reader.header(lacking[0], CONDITION_MEMBER) is None


def test_a_long_header_is_read_whole(tmp_path: Path) -> None:
    text = torch.randn(3, 4)
    info = SampleInfo(
        caption="c",
        type="text",
        source="",
        width=16,
        height=16,
        frames=1,
        frame_indices=[],
        fps=None,
        source_width=None,
        source_height=None,
    )
    sample = Sample(key=sample_key("1", {}, 0), info=info, latents=None, text=text)
    members = sample.members()
    members[TEXT_MEMBER] = safetensors.torch.save({"text": text}, {"by": "x" * 5000})
    writer = ShardWriter(Store(tmp_path), {"format": 1}, shard_bytes=1)
    writer.add_members(sample.key, info.bucket, members)
    writer.close()
    reader = MemberReader(build_index(Store(tmp_path)))
    read = torch.zeros(3, 4)
    header = reader.header(0, TEXT_MEMBER)
    assert header is not None
    reader.read_into(header, "text", read)
    assert torch.equal(read, text)
