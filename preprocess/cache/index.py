"""`manifest.json` and `index.zarr`, derived from the committed tars and their sidecars.

Both can be deleted at any time and rebuilt from what `shared.format.cache.committed_shards` finds.
The index is written beside and swapped in, the manifest last: a reader that comes between sees that
the two do not belong together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from preprocess.cache.shard_rows import columns_of, scan_shard, stored_rows
from preprocess.cache.writer import index_lock
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import (
    INDEX,
    MANIFEST,
    MOST_MANIFEST,
    REENCODE_SHARD,
    CacheIndex,
    Sidecar,
    Tombstones,
    age,
    committed_shards,
    committed_tombstones,
    open_cache,
)
from shared.format.columns import COLUMNS, Columns, column_digest, written
from shared.format.fingerprint import FORMAT_VERSION, of_cache, refuse_differences
from shared.format.latent_rgb import ColourFit, LatentRgb, solve
from shared.format.schema import KEY_BYTES
from shared.format.strict_json import parse
from shared.io.durable import (
    fault_point,
    fsync_file,
    fsync_folder,
    remove_tree,
    rename,
    temporary,
    write_json,
)
from shared.io.hashing import FileHasher, digest_of
from shared.io.store import Store

# Rows of a column that are written and read together.
CHUNK_ROWS = 1 << 16


def fresh_index(store: Store) -> CacheIndex:
    """Open the cache's index, brought up to date first where it is missing, stale or damaged."""
    while True:
        store.pull()
        entries = entries_of(store.folder)
        found = _written(store)
        if found is not None and found[0].digest == entries.digest:
            return found[0]
        index = write_index(store, entries, _reusable(found, entries))
        if not store.is_remote:
            return index
        # Another writer may have put its index between our objects, or its shards after we
        # looked; whoever writes last finds it here and writes again.


def settled_index(store: Store) -> CacheIndex:
    """`fresh_index`, read whole: another writer may replace the file at any time after."""
    with index_lock(store.folder):
        index = fresh_index(store)
        index.read_columns()
        return index


def live_columns(store: Store) -> tuple[Columns, tuple[str, ...]]:
    """The index's columns as they would be now, and the prompts' shards; nothing is written."""
    entries = entries_of(store.folder)
    columns = _columns(store, entries, _reusable(_written(store), entries))
    return columns, tuple(sidecar.shard for sidecar in entries.prompts)


def build_index(store: Store) -> CacheIndex:
    """Write `index.zarr` and `manifest.json` from the committed shards alone; open the result.

    Where several shards hold the same key, the newest (`shared.format.cache.age`) counts: that is
    how an edited caption replaces the old sample. A key whose newest mention is a tombstone is left
    out. Raises UserError naming a damaged shard, or two shards that were made with different
    settings.
    """
    store.pull()
    index = write_index(store, entries_of(store.folder), None)
    return fresh_index(store) if store.is_remote else index


@dataclass(frozen=True, kw_only=True)
class Entries:
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
        """Of an index of these: changes with any of them."""
        shards = [[sidecar.shard, sidecar.sha256] for sidecar in self.sidecars]
        removed = [[dead.name, dead.sha256] for dead in self.tombstones]
        return digest_of([FORMAT_VERSION, shards + removed])


def entries_of(folder: Path) -> Entries:
    """What is committed in a folder."""
    return Entries(sidecars=committed_shards(folder), tombstones=committed_tombstones(folder))


def _written(store: Store) -> tuple[CacheIndex, dict[str, str]] | None:
    """The index that is there, read whole, and SHA-256 of each file that it was made from.

    None where it is missing or damaged.
    """
    try:
        manifest = parse((store.folder / MANIFEST).read_bytes(), most=MOST_MANIFEST)
        files = manifest["shards"] + manifest["tombstones"]
        made_from = {entry["name"]: entry["sha256"] for entry in files}
        index = open_cache(store)
        index.read_columns()
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        return None
    return index, made_from


def _reusable(
    written: tuple[CacheIndex, dict[str, str]] | None, entries: Entries
) -> tuple[set[str], Columns] | None:
    """The rows of the index that is there, and the shards that they stand for.

    None where it cannot be built upon: a shard or a tombstone that it knew is gone or another, so
    that a row which it left out may count again.
    """
    if written is None:
        return None
    index, made_from = written
    here = {sidecar.shard: sidecar.sha256 for sidecar in entries.samples}
    dead = {tombstones.name: tombstones.sha256 for tombstones in entries.tombstones}
    if not made_from.items() <= (here | dead).items():
        return None
    columns = index.read_columns()
    numbers = {name: number for number, name in enumerate(sorted(here))}
    renumbered = np.asarray([numbers[name] for name in index.shards], dtype=np.int32)
    columns["shard"] = renumbered[columns["shard"]]
    return set(index.shards), columns


def _columns(store: Store, entries: Entries, reusable: tuple[set[str], Columns] | None) -> Columns:
    """The live rows, by key; `bucket` is not filled in."""
    _refuse_mixed(store, entries.sidecars)
    known, columns = reusable or (set(), columns_of({}))
    sidecars = entries.samples
    scanned = [
        (stored_rows(store.folder, sidecar) or scan_shard(store, sidecar))
        | {"shard": np.full(sidecar.count, number, np.int32)}
        for number, sidecar in enumerate(sidecars)
        if sidecar.shard not in known
    ]
    columns = {
        name: np.concatenate([columns[name], *(new.pop(name) for new in scanned)])
        for name in COLUMNS
    }
    return _live(columns, sidecars, entries.tombstones)


def write_index(
    store: Store, entries: Entries, reusable: tuple[set[str], Columns] | None
) -> CacheIndex:
    """Write index and manifest of these shards; open the result.

    `reusable`: names of shards with all their rows, which are then not read again.
    """
    columns = _columns(store, entries, reusable)
    sidecars = entries.samples
    buckets = sorted({sidecar.bucket for sidecar in sidecars if sidecar.bucket})
    position = {bucket: number for number, bucket in enumerate(buckets)}
    bucket_of_shard = np.asarray([position[s.bucket] for s in sidecars if s.bucket], np.int32)
    columns["bucket"] = bucket_of_shard[columns["shard"]]
    latent_rgb = _latent_rgb(store, sidecars)

    _write_zarr(store, columns, entries.digest)
    manifest = manifest_of(entries, buckets, columns["bucket"], latent_rgb)
    write_json(store.folder / MANIFEST, manifest, commit=store.commit)
    return open_cache(store)


def manifest_of(
    entries: Entries,
    buckets: Sequence[Bucket],
    bucket_ids: npt.NDArray[np.int32],
    latent_rgb: LatentRgb | None,
) -> dict[str, Any]:
    """`manifest.json` of these shards; `bucket_ids`: (N) of the live samples, in `buckets`."""

    def listed(sidecars: list[Sidecar]) -> list[dict[str, Any]]:
        return [
            {"name": s.shard, "sha256": s.sha256, "bytes": s.bytes, "count": s.count}
            for s in sidecars
        ]

    every = [sidecar.fingerprint for sidecar in entries.sidecars]
    per_bucket = np.bincount(bucket_ids, minlength=len(buckets)).tolist()
    return {
        "format": FORMAT_VERSION,
        "index": entries.digest,
        "samples": len(bucket_ids),
        "buckets": [
            {**asdict(bucket), "samples": number}
            for bucket, number in zip(buckets, per_bucket, strict=True)
        ],
        "shards": listed(entries.samples),
        "prompts": listed(entries.prompts),
        "tombstones": [
            {"name": removed.name, "sha256": removed.sha256, "count": len(removed.keys)}
            for removed in entries.tombstones
        ],
        "fingerprint": of_cache(every[0], every) if every else {},
        "latent_rgb": latent_rgb.to_json() if latent_rgb else None,
    }


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


def _latent_rgb(store: Store, sidecars: list[Sidecar]) -> LatentRgb | None:
    """The map of the whole cache, from what each shard's writer summed up."""

    def part(sidecar: Sidecar) -> ColourFit:
        try:
            return ColourFit.from_json(sidecar.latent_rgb)
        except ValueError as error:
            path = Sidecar.path_for(store.folder / sidecar.shard)
            raise UserError(
                f"sidecar: latent_rgb of {path} is damaged ({error}). Set it to null, which costs "
                "this shard's share in the preview map and nothing else."
            ) from error

    parts = (part(sidecar) for sidecar in sidecars if sidecar.latent_rgb is not None)
    try:
        return solve(parts)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"sidecar: latent_rgb of the shards in {store} does not agree ({error}). Set it to "
            "null in the odd ones, which costs their share in the preview map and nothing else."
        ) from error


def check_shards(store: Store, names: Iterable[str] | None = None) -> None:
    """Raise UserError naming a tar whose bytes are not those of its sidecar (all, or `names`)."""
    hasher = FileHasher()
    for sidecar in committed_shards(store.folder):
        if names is not None and sidecar.shard not in names:
            continue
        tar = store.folder / sidecar.shard
        if not tar.is_file():  # a pipe would be waited for
            raise UserError(f"shards: {tar} is no file. {REENCODE_SHARD}")
        found = hasher.sha256(store.shard_file(tar))
        if found != sidecar.sha256:
            raise UserError(
                f"shards: {tar} is damaged: its SHA-256 is {found[:12]}…, the sidecar says "
                f"{sidecar.sha256[:12]}…. {REENCODE_SHARD}"
            )


def _refuse_mixed(store: Store, sidecars: list[Sidecar]) -> None:
    for sidecar in sidecars[1:]:
        refuse_differences(
            sidecar.fingerprint,
            sidecars[0].fingerprint,
            what=f"shards: {sidecar.shard} and {sidecars[0].shard} in {store} were made with "
            "different settings",
            cure="Move one of the two kinds (tars with their .json) to a folder of its own.",
        )


class _Files(LocalStore):
    """zarr's folder store, with a point where it may fail before every file."""

    async def set(self, key: str, value: Buffer) -> None:
        fault_point("write", self.root / key)
        await super().set(key, value)


def _write_zarr(store: Store, columns: Columns, digest: str) -> None:
    arrays = written(columns)
    final = store.folder / INDEX
    beside = temporary(final)
    remove_tree(beside)
    attributes = {
        "format": FORMAT_VERSION,
        "digest": digest,
        # zarr reads a lost chunk as zeros, without a word.
        "sha256": {name: column_digest(values) for name, values in arrays.items()},
    }
    group = zarr.create_group(store=_Files(beside), attributes=attributes)
    for name, values in arrays.items():
        per_row = values.shape[1:]
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(min(CHUNK_ROWS, max(1, len(values))), *per_row),
            # As they are, each one: a reader sees in the files' sizes what it will get.
            compressors=None,
            config={"write_empty_chunks": True},
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
    store.rename(beside, final)
    fsync_folder(store.folder)
    remove_tree(old)
