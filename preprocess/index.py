"""`manifest.json` and `index.zarr`, derived from the committed tars and their sidecars.

Both can be deleted at any time and rebuilt from what `shared.cache.committed_shards` finds. The
index is written beside and swapped in, the manifest last: a reader that comes between sees that
the two do not belong together.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from preprocess.writer import index_lock
from shared.cache import (
    COLUMNS,
    INDEX,
    MANIFEST,
    MEDIA_TYPES,
    REENCODE_SHARD,
    CacheIndex,
    Sidecar,
    Tombstones,
    age,
    column_digest,
    committed_shards,
    committed_tombstones,
    open_cache,
)
from shared.durable import (
    fault_point,
    fsync_file,
    fsync_folder,
    remove_tree,
    rename,
    temporary,
    write_json,
)
from shared.errors import UserError
from shared.fingerprint import FORMAT_VERSION, refuse_differences
from shared.hashing import FileHasher, digest_of
from shared.latent_rgb import ColourFit, LatentRgb, solve
from shared.overlays import made_by, required_members
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
    repeats: int = 1
    offset: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))
    length: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))


def caption_digest(caption: str) -> bytes:
    """What the index keeps of a caption: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(caption.encode()).digest()[:KEY_BYTES]


def fresh_index(folder: Path) -> CacheIndex:
    """Open the cache's index, brought up to date first where it is missing, stale or damaged."""
    entries = _entries(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["index"] == entries.digest:
            index = open_cache(folder)
            index.read_columns()
            return index
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        pass
    return _write_index(folder, entries, _reusable(folder, entries))


def settled_index(folder: Path) -> CacheIndex:
    """`fresh_index`, read whole: another writer may replace the file at any time after."""
    with index_lock(folder):
        index = fresh_index(folder)
        _ = index.keys, index.captions, index.bucket_ids, index.shard_ids
        _ = index.types, index.tokens, index.repeats, index.offsets, index.lengths
        return index


def build_index(folder: Path) -> CacheIndex:
    """Write `index.zarr` and `manifest.json` from the committed shards alone; open the result.

    Where several shards hold the same key, the newest (`shared.cache.age`) counts: that is how an
    edited caption replaces the old sample. A key whose newest mention is a tombstone is left out.
    Raises UserError naming a damaged shard, or two shards that were made with different settings.
    """
    return _write_index(folder, _entries(folder), None)


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """Everything that an index is made from, each list by name."""

    sidecars: list[Sidecar]
    tombstones: list[Tombstones]

    @property
    def samples(self) -> list[Sidecar]:
        return [sidecar for sidecar in self.sidecars if sidecar.kind != "prompts"]

    @property
    def prompts(self) -> list[Sidecar]:
        return [sidecar for sidecar in self.sidecars if sidecar.kind == "prompts"]

    @property
    def digest(self) -> str:
        """Changes with any of them."""
        shards = [[sidecar.shard, sidecar.sha256] for sidecar in self.sidecars]
        removed = [[tombstones.name, tombstones.sha256] for tombstones in self.tombstones]
        return digest_of([FORMAT_VERSION, shards + removed])


def _entries(folder: Path) -> _Entries:
    return _Entries(sidecars=committed_shards(folder), tombstones=committed_tombstones(folder))


Columns = dict[str, npt.NDArray[Any]]
"""Column name → values, as `COLUMNS` says."""


def _reusable(folder: Path, entries: _Entries) -> tuple[set[str], Columns] | None:
    """The rows of the index that is there, and the shards that they stand for.

    None where it cannot be built upon: a shard or a tombstone that it knew is gone or another, so
    that a row which it left out may count again.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = {entry["name"]: entry["sha256"] for entry in manifest["shards"]}
        removed = {entry["name"]: entry["sha256"] for entry in manifest["tombstones"]}
        index = open_cache(folder)
        columns = index.read_columns()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    here = {sidecar.shard: sidecar.sha256 for sidecar in entries.samples}
    dead = {tombstones.name: tombstones.sha256 for tombstones in entries.tombstones}
    if not (known.items() <= here.items() and removed.items() <= dead.items()):
        return None
    columns["shard"] = _renumbered(columns["shard"], list(index.shards), sorted(here))
    return set(known), columns


def _renumbered(
    positions: npt.NDArray[Any], old: list[str], new: list[str]
) -> npt.NDArray[np.int32]:
    """Positions in `old` as positions in `new`."""
    numbers = {name: number for number, name in enumerate(new)}
    return np.asarray([numbers[name] for name in old], dtype=np.int32)[positions]


def _write_index(
    folder: Path, entries: _Entries, reusable: tuple[set[str], Columns] | None
) -> CacheIndex:
    _refuse_mixed(folder, entries.sidecars)
    known, columns = reusable or (set(), _columns([], 0))
    samples = entries.samples
    scanned = [
        _columns(list(_rows(folder, sidecar, number)), number)
        for number, sidecar in enumerate(samples)
        if sidecar.shard not in known
    ]
    columns = {
        name: np.concatenate([columns[name], *(new[name] for new in scanned)]) for name in COLUMNS
    }
    columns = _live(columns, samples, entries.tombstones)
    buckets = sorted({sidecar.bucket for sidecar in samples if sidecar.bucket})
    bucket_of_shard = np.asarray([buckets.index(s.bucket) for s in samples if s.bucket], np.int32)
    columns["bucket"] = bucket_of_shard[columns["shard"]]
    per_bucket = np.bincount(columns["bucket"], minlength=len(buckets))
    latent_rgb = _latent_rgb(folder, samples)

    _write_zarr(folder, columns, entries.digest)
    manifest = {
        "format": FORMAT_VERSION,
        "index": entries.digest,
        "samples": len(columns["key"]),
        "buckets": [
            {"height": b.height, "width": b.width, "frames": b.frames, "samples": int(count)}
            for b, count in zip(buckets, per_bucket, strict=True)
        ],
        "shards": [_shard_entry(sidecar) for sidecar in samples],
        "prompts": [_shard_entry(sidecar) for sidecar in entries.prompts],
        "tombstones": [
            {"name": removed.name, "sha256": removed.sha256, "count": len(removed.keys)}
            for removed in entries.tombstones
        ],
        "fingerprint": entries.sidecars[0].fingerprint if entries.sidecars else {},
        "latent_rgb": latent_rgb.to_json() if latent_rgb else None,
    }
    write_json(folder / MANIFEST, manifest)
    return open_cache(folder)


def _live(columns: Columns, samples: list[Sidecar], tombstones: list[Tombstones]) -> Columns:
    """The rows that count, by key: of all that is said about a key, the newest decides."""
    ages = sorted({age(s.shard) for s in samples} | {age(t.name) for t in tombstones})
    rank = {when: number for number, when in enumerate(ages)}
    of_shard = np.asarray([rank[age(sidecar.shard)] for sidecar in samples], dtype=np.int64)
    removed = [bytes.fromhex("".join(t.keys)) for t in tombstones]
    keys = np.concatenate(
        [columns["key"], np.frombuffer(b"".join(removed), np.uint8).reshape(-1, KEY_BYTES)]
    )
    when = np.concatenate(
        [
            of_shard[columns["shard"]],
            np.repeat([rank[age(t.name)] for t in tombstones], [len(t.keys) for t in tombstones]),
        ]
    )
    halves = np.ascontiguousarray(keys).view(">u8")
    order = np.lexsort((when, halves[:, 1], halves[:, 0]))
    ordered = keys[order]
    newest = np.ones(len(order), dtype=bool)
    newest[:-1] = (ordered[1:] != ordered[:-1]).any(axis=1)
    chosen = order[newest]
    chosen = chosen[chosen < len(columns["key"])]  # beyond are the tombstones
    return {name: values[chosen] for name, values in columns.items()}


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
    required = required_members(sidecar.fingerprint)
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
            lacking = [name for name in required if not row.length[MEMBERS.index(name)]]
            if lacking:
                raise _DamagedError(f"sample {row.key} has no {lacking[0]}")
    except (_DamagedError, OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"shards: {path} is damaged ({error}). Restore it, or delete it together with "
            f"{Sidecar.path_for(path).name} and run `{made_by(sidecar.fingerprint)}` again: it "
            "encodes only what is missing."
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
        row.repeats = int(info.get("repeats", 1))  # older shards have none
    else:
        # safetensors begins with its header's length (8 bytes, little endian) and the header.
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, row.length[MEMBERS.index(suffix)])))
        row.tokens = int(header["text"]["shape"][0])


def _columns(rows: list[_Row], shard: int) -> Columns:
    """Rows of one shard. `bucket` follows from the shard and is filled in later."""
    values: dict[str, list[Any]] = {
        "key": [list(bytes.fromhex(row.key)) for row in rows],
        "caption": [list(row.caption) for row in rows],
        "bucket": [0] * len(rows),
        "shard": [shard] * len(rows),
        "type": [row.type for row in rows],
        "tokens": [row.tokens for row in rows],
        "repeats": [row.repeats for row in rows],
        "offset": [row.offset for row in rows],
        "length": [row.length for row in rows],
    }
    return {
        name: np.asarray(values[name], dtype=dtype).reshape(-1, *per_row)
        for name, (dtype, per_row) in COLUMNS.items()
    }


class _Store(LocalStore):
    """zarr's folder store, with a point where it may fail before every file."""

    async def set(self, key: str, value: Buffer) -> None:
        fault_point("write", self.root / key)
        await super().set(key, value)


def _write_zarr(folder: Path, arrays: Columns, digest: str) -> None:
    beside, final = temporary(folder / INDEX), folder / INDEX
    remove_tree(beside)
    attributes = {
        "format": FORMAT_VERSION,
        "digest": digest,
        # zarr reads a lost chunk as zeros, without a word.
        "sha256": {name: column_digest(values) for name, values in arrays.items()},
    }
    group = zarr.create_group(store=_Store(beside), attributes=attributes)
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
    remove_tree(old)
    if final.exists():
        rename(final, old)
    rename(beside, final)
    fsync_folder(folder)
    remove_tree(old)
