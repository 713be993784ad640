"""`manifest.json` and `index.zarr`, derived from the committed tars and their sidecars.

Both can be deleted at any time and rebuilt from what `shared.cache.committed_shards` finds. The
index is written beside and swapped in, the manifest last: a reader that comes between sees that
the two do not belong together.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr

from shared.cache import (
    COLUMNS,
    INDEX,
    MANIFEST,
    MEDIA_TYPES,
    REENCODE_SHARD,
    CacheIndex,
    Sidecar,
    column_digest,
    committed_shards,
    open_cache,
)
from shared.durable import fsync_file, fsync_folder, temporary, write_json
from shared.errors import UserError
from shared.fingerprint import FORMAT_VERSION, refuse_differences
from shared.hashing import FileHasher, digest_of
from shared.latent_rgb import ColourFit, LatentRgb, solve
from shared.schema import JSON_MEMBER, KEY_BYTES, MEMBERS, TEXT_MEMBER

# Rows of a column that are compressed and read together.
CHUNK_ROWS = 1 << 16


@dataclass
class _Row:
    """A sample as found in one tar."""

    key: str
    shard: int
    caption: bytes = b""
    type: int = 0
    tokens: int = 0
    offset: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))
    length: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))


def caption_digest(caption: str) -> bytes:
    """What the index keeps of a caption: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(caption.encode()).digest()[:KEY_BYTES]


def fresh_index(folder: Path) -> CacheIndex:
    """Open the cache's index, rebuilt first where it is missing, stale or damaged."""
    sidecars = committed_shards(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["index"] == _digest(sidecars):
            index = open_cache(folder)
            index.read_columns()
            return index
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        pass
    return build_index(folder)


def build_index(folder: Path) -> CacheIndex:
    """Write `index.zarr` and `manifest.json` from the committed shards, and open the result.

    Where several shards hold the same key, the one whose name sorts last counts: that is how an
    edited caption replaces the old sample. Raises UserError naming a damaged shard, or two shards
    that were made with different settings.
    """
    sidecars = committed_shards(folder)
    _refuse_mixed(folder, sidecars)
    samples = [sidecar for sidecar in sidecars if sidecar.kind == "samples"]
    prompts = [sidecar for sidecar in sidecars if sidecar.kind == "prompts"]

    live: dict[str, _Row] = {}
    for number, sidecar in enumerate(samples):
        live |= {row.key: row for row in _rows(folder, sidecar, number)}
    rows = [live[key] for key in sorted(live)]
    buckets = sorted({sidecar.bucket for sidecar in samples if sidecar.bucket})
    bucket_of_shard = [buckets.index(s.bucket) for s in samples if s.bucket]
    digest = _digest(sidecars)
    latent_rgb = _latent_rgb(folder, samples)

    _write_zarr(folder, _columns(rows, bucket_of_shard), digest)
    per_bucket = [0] * len(buckets)
    for row in rows:
        per_bucket[bucket_of_shard[row.shard]] += 1
    manifest = {
        "format": FORMAT_VERSION,
        "index": digest,
        "samples": len(rows),
        "buckets": [
            {"height": b.height, "width": b.width, "frames": b.frames, "samples": count}
            for b, count in zip(buckets, per_bucket, strict=True)
        ],
        "shards": [_shard_entry(sidecar) for sidecar in samples],
        "prompts": [_shard_entry(sidecar) for sidecar in prompts],
        "fingerprint": sidecars[0].fingerprint if sidecars else {},
        "latent_rgb": latent_rgb.to_json() if latent_rgb else None,
    }
    write_json(folder / MANIFEST, manifest)
    return open_cache(folder)


def _latent_rgb(folder: Path, sidecars: list[Sidecar]) -> LatentRgb | None:
    """The map of the whole cache, from what each shard's writer summed up."""

    def part(sidecar: Sidecar) -> ColourFit:
        try:
            return ColourFit.from_json(sidecar.latent_rgb)
        except ValueError as error:
            path = Sidecar.path_for(folder / sidecar.shard)
            raise UserError(
                f"sidecar: latent_rgb of {path} is damaged ({error}). Set it to null, which costs "
                "this shard's share in the preview map and nothing else."
            ) from error

    return solve(part(sidecar) for sidecar in sidecars if sidecar.latent_rgb is not None)


def check_shards(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise UserError naming a tar whose bytes are not those of its sidecar (all, or `names`)."""
    hasher = FileHasher()
    for sidecar in committed_shards(folder):
        if names is not None and sidecar.shard not in names:
            continue
        tar = folder / sidecar.shard
        found = hasher.sha256(tar)
        if found != sidecar.sha256:
            raise UserError(
                f"shards: {tar} is damaged: its SHA-256 is {found[:12]}…, the sidecar says "
                f"{sidecar.sha256[:12]}…. {REENCODE_SHARD}"
            )


def _digest(sidecars: list[Sidecar]) -> str:
    """Which shards an index was made from."""
    return digest_of([FORMAT_VERSION, [[s.shard, s.sha256] for s in sidecars]])


def _shard_entry(sidecar: Sidecar) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": sidecar.shard,
        "sha256": sidecar.sha256,
        "bytes": sidecar.bytes,
        "count": sidecar.count,
    }
    return entry


def _refuse_mixed(folder: Path, sidecars: list[Sidecar]) -> None:
    for sidecar in sidecars[1:]:
        refuse_differences(
            sidecar.fingerprint,
            sidecars[0].fingerprint,
            what=f"shards: {sidecar.shard} and {sidecars[0].shard} in {folder} were made with "
            "different settings",
            cure="Move one of the two kinds (tars with their .json) to a folder of its own.",
        )


def _rows(folder: Path, sidecar: Sidecar, shard: int) -> Iterator[_Row]:
    """The samples of one tar, by reading its headers, its JSON and the head of each text member."""
    path = folder / sidecar.shard
    rows: dict[str, _Row] = {}
    try:
        size = path.stat().st_size
        if size != sidecar.bytes:
            raise _DamagedError(f"it has {size} bytes, its sidecar says {sidecar.bytes}")
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix not in MEMBERS or len(bytes.fromhex(key)) != KEY_BYTES:
                    raise _DamagedError(f"unexpected member {member.name!r}")
                row = rows.setdefault(key, _Row(key, shard))
                column = MEMBERS.index(suffix)
                row.offset[column] = member.offset_data
                row.length[column] = member.size
                if suffix in (JSON_MEMBER, TEXT_MEMBER):
                    _read_details(row, suffix, tar.extractfile(member))
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header of a large shard
        if len(rows) != sidecar.count:
            raise _DamagedError(f"it holds {len(rows)} samples, its sidecar says {sidecar.count}")
        for row in rows.values():
            lacking = [name for name in MEMBERS[:3] if not row.length[MEMBERS.index(name)]]
            if lacking:
                raise _DamagedError(f"sample {row.key} has no {lacking[0]}")
    except (_DamagedError, OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"shards: {path} is damaged ({error}). Restore it, or delete it together with "
            f"{Sidecar.path_for(path).name} and run `wanprep encode` again: it encodes only what "
            "is missing."
        ) from error
    yield from rows.values()


class _DamagedError(Exception):
    """What is wrong with a tar."""


def _read_details(row: _Row, suffix: str, stream: IO[bytes] | None) -> None:
    if stream is None:
        raise _DamagedError(f"{row.key}.{suffix} is not a file")
    if suffix == JSON_MEMBER:
        info = json.load(stream)
        row.caption = caption_digest(info["caption"])
        row.type = MEDIA_TYPES.index(info["type"])
    else:
        # safetensors begins with its header's length (8 bytes, little endian) and the header.
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, row.length[MEMBERS.index(suffix)])))
        row.tokens = int(header["text"]["shape"][0])


def _columns(rows: list[_Row], bucket_of_shard: list[int]) -> dict[str, Any]:
    return {
        "key": [list(bytes.fromhex(row.key)) for row in rows],
        "caption": [list(row.caption) for row in rows],
        "bucket": [bucket_of_shard[row.shard] for row in rows],
        "shard": [row.shard for row in rows],
        "type": [row.type for row in rows],
        "tokens": [row.tokens for row in rows],
        "offset": [row.offset for row in rows],
        "length": [row.length for row in rows],
    }


def _write_zarr(folder: Path, columns: dict[str, Any], digest: str) -> None:
    beside, final = temporary(folder / INDEX), folder / INDEX
    shutil.rmtree(beside, ignore_errors=True)
    arrays = {
        name: np.asarray(columns[name], dtype=dtype).reshape(-1, *per_row)
        for name, (dtype, per_row) in COLUMNS.items()
    }
    attributes = {
        "format": FORMAT_VERSION,
        "digest": digest,
        # zarr reads a lost chunk as zeros, without a word.
        "sha256": {name: column_digest(values) for name, values in arrays.items()},
    }
    group = zarr.create_group(store=beside, attributes=attributes)
    for name, values in arrays.items():
        per_row = values.shape[1:]
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(min(CHUNK_ROWS, max(1, len(values))), *per_row),
        )
        if len(values):
            array[:] = values
    for path in beside.rglob("*"):
        if path.is_file():
            fsync_file(path)
    # A folder cannot replace a folder in one step. Between the two renames there is no index,
    # and readers say so; nothing is lost, since it is derived.
    old = final.with_name(f"{INDEX}.old{beside.suffix}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    beside.rename(final)
    fsync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
