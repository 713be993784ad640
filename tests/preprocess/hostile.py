"""A small cache, ways to make it hostile, and a reader of everything that is in it."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.cache.index import build_index
from shared.cache.writer import ShardWriter
from shared.format.cache import MemberReader, Sidecar, open_cache
from shared.format.columns import column_digest
from shared.format.overlays import captions_of, overlays_in, with_captions
from shared.format.prompts import Prompt, read_prompts
from shared.format.schema import (
    JSON_MEMBER,
    MEMBERS,
    TEXT_MEMBER,
    Sample,
    SampleInfo,
    pack,
    sample_key,
)
from shared.io.store import Store

TEXT = {"encoder": "e", "tokenizer": "t", "dim": 4, "dtype": "fp32", "compute": "fp32"}
FINGERPRINT = {
    "format": 1,
    "mode": "i2v",
    "latents": {"vae": "v", "dtype": "fp32", "compute": "fp32", "mean": [0.5], "std": [2.0]},
    "text": TEXT,
}
Contents = dict[str, Any]


def sample(number: int) -> Sample:
    info = SampleInfo(
        caption=f"caption {number}",
        type="video",
        source=f"{number}.mp4",
        width=16,
        height=24,
        frames=5,
        frame_indices=[0, 2, 4, 6, 8],
        fps=16.0,
        source_width=20,
        source_height=30,
    )
    return Sample(
        key=sample_key(str(number), {}, 0),
        info=info,
        latents=torch.full((2, 2, 3, 2), 1.0 + number),
        text=torch.full((number + 1, 4), 2.0 + number),
        cond=torch.full((2, 2, 3, 2), -1.0 - number),
    )


def make(folder: Path) -> Path:
    """Two shards of two and one samples, a prompt bank, a tombstone, captions beside them."""
    folder.mkdir(parents=True)
    writer = ShardWriter(Store(folder), FINGERPRINT, shard_bytes=10**9)
    writer.add_prompts([Prompt(role, role, torch.ones(2, 4)) for role in ("empty", "negative")])
    for numbers in ((0, 1), (2, 3)):
        for number in numbers:
            frames = np.full((5, 24, 16, 3), 40 * number, np.uint8)
            writer.add(sample(number), frames)
        writer.close()
    writer.add_tombstones([sample(3).key])
    build_index(Store(folder))
    captions = captions_of(Store(folder), "other").folder
    captions.mkdir(parents=True)
    overlay = {"format": 1, "overlay": "captions", "text": TEXT}
    writer = ShardWriter(Store(captions), overlay, shard_bytes=10**9)
    writer.add_prompts([Prompt("empty", "", torch.ones(1, 4))])
    members = {
        JSON_MEMBER: sample(0).info.to_bytes(),
        TEXT_MEMBER: pack(text=torch.full((3, 4), 9.0)),
    }
    writer.add_members(sample(0).key, sample(0).info.bucket, members)
    writer.close()
    build_index(Store(captions))
    return folder


def read(folder: Path) -> Contents:
    """Everything that a cache says, through the readers that all commands use."""
    index = open_cache(Store(folder))
    beside = {one.folder.name for one in overlays_in(Store(folder))}
    if folder.name != "other" and "other" in beside:
        index = with_captions(index, "other")
    index.read_columns()
    reader = MemberReader(index)
    try:
        contents: Contents = {}
        for row in range(len(index)):
            info = reader.info(row)
            assert isinstance(info["caption"], str) and info["type"] == "video"
            tensors = {member: reader.read(row, member) for member in MEMBERS[1:]}
            contents[index.key(row)] = {
                "info": info,
                "shapes": {
                    member: {name: tuple(tensor.shape) for name, tensor in (found or {}).items()}
                    for member, found in tensors.items()
                },
            }
    finally:
        reader.close()
    prompts = read_prompts(index.store, index.prompt_shards)
    contents["prompts"] = [(p.role, p.prompt, tuple(p.text.shape)) for p in prompts]
    return contents


def rebuilt(folder: Path) -> Contents:
    """`read`, after the index of the cache and of its overlays was made anew."""
    for one in (Store(folder), *overlays_in(Store(folder))):
        build_index(one)
    return read(folder)


def copy(whole: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(whole, to)
    return to


def shard(folder: Path, kind: str = "h24-") -> Path:
    """The first tar of a kind."""
    return min(folder.glob(f"{kind}*.tar"))


def make_consistent(tar: Path, **other: object) -> None:
    """What a hostile writer does: the sidecar tells the truth about the tar."""
    path = Sidecar.path_for(tar)
    data = tar.read_bytes()
    value = json.loads(path.read_text())
    own = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps({**value, **own, **other}))


def replace_tar(tar: Path, files: list[tuple[tarfile.TarInfo, bytes]], **sidecar: object) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for info, data in files:
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    tar.write_bytes(stream.getvalue())
    make_consistent(tar, **sidecar)


def with_members(folder: Path, number: int, change: Mapping[str, bytes]) -> Path:
    """The first shard with one sample alone, of which some members are other bytes."""
    members = {**sample(number).members(), **change}
    files = [
        (tarfile.TarInfo(f"{sample(number).key}.{name}"), members[name])
        for name in (*MEMBERS, *(other for other in change if other not in MEMBERS))
        if name in members
    ]
    tar = shard(folder)
    replace_tar(tar, files, count=1)
    return tar


def rewrite_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rewrite_column(folder: Path, name: str, values: Any) -> None:
    """Another column, with a digest that agrees: its one chunk and the group's attributes."""
    (chunk,) = (path for path in (folder / "index.zarr" / name / "c").rglob("*") if path.is_file())
    chunk.write_bytes(values.tobytes())
    digest = column_digest(values)

    def change(group: Any) -> Any:
        group["attributes"]["sha256"][name] = digest
        return group

    rewrite_json(folder / "index.zarr" / "zarr.json", change)
