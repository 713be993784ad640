"""Reclaiming the space of dead samples: removed ones, and those that a newer shard replaced.

What is alive is copied to new shards first, those are committed, then the old shards go, and the
tombstones last. Killed anywhere, every live sample is in some committed shard, a sample that is in
two is the same in both, and what was removed is either gone or still under its tombstone.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from preprocess.cache.remove import require_shards
from shared.cache.index import check_shards, fresh_index, settled_index
from shared.cache.writer import (
    ShardWriter,
    output_lock,
    reader_lock,
    refusals_explained,
    remove_uncommitted,
)
from shared.format.cache import (
    CacheIndex,
    MemberReader,
    Sidecar,
    committed_shards,
    committed_tombstones,
)
from shared.format.latent_rgb import ColourFit
from shared.format.overlays import overlays_in, positions
from shared.format.schema import MEMBERS
from shared.io.durable import fsync_folder
from shared.io.store import Store


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What came of it."""

    index: CacheIndex
    dropped: int
    """Dead samples that are gone now."""
    freed: int
    """Bytes of shards, net."""


def compact_with_overlays(store: Store, *, shard_bytes: int) -> Compacted:
    """`compact` of a cache, then of its overlays, which lose what the cache has no more."""
    done = compact(store, shard_bytes=shard_bytes)
    for overlay in overlays_in(store):
        with reader_lock(store.folder):
            _drop_orphans(overlay, settled_index(store))
            also = compact(overlay, shard_bytes=shard_bytes)
        done = replace(done, dropped=done.dropped + also.dropped, freed=done.freed + also.freed)
    return done


def _drop_orphans(overlay: Store, base: CacheIndex) -> None:
    """Tombstones for the samples of an overlay that the cache does not have."""
    with (
        output_lock(overlay.folder),
        refusals_explained(overlay.folder, "Nothing of it was removed."),
    ):
        remove_uncommitted(overlay, None)
        index = fresh_index(overlay)
        orphans = np.flatnonzero(positions(index.keys, base.keys) < 0)
        if len(orphans):
            writer = ShardWriter(overlay, index.fingerprint, shard_bytes=1)
            writer.add_tombstones(index.key(int(row)) for row in orphans)


def compact(
    store: Store, *, shard_bytes: int, on_progress: Callable[[int], None] = lambda bytes_: None
) -> Compacted:
    """Rewrite every shard that holds dead samples. `on_progress` gets the bytes of each shard done.

    Takes room for the live samples of one bucket while it runs. Raises UserError naming a damaged
    shard, which must not be copied under a fresh checksum.
    """
    require_shards(store)
    kept = "No live sample is lost; the same command goes on from there."
    folder = store.folder
    with output_lock(folder), refusals_explained(folder, kept):
        remove_uncommitted(store, None)
        index = fresh_index(store)
        before = _bytes(folder)
        live = np.bincount(index.shard_ids, minlength=len(index.shards))
        alive = dict(zip(index.shards, live, strict=True))
        dirty = [
            sidecar
            for sidecar in committed_shards(folder)
            if sidecar.kind != "prompts" and alive[sidecar.shard] < sidecar.count
        ]
        check_shards(store, {sidecar.shard for sidecar in dirty})
        writer = ShardWriter(store, index.fingerprint, shard_bytes=shard_bytes)
        for bucket in dict.fromkeys(sidecar.bucket for sidecar in dirty):
            old = [sidecar for sidecar in dirty if sidecar.bucket == bucket]
            _copy_live(index, old, writer)
            for sidecar in old:
                _delete(store, sidecar)
                on_progress(sidecar.bytes)
        # No dead sample is left in any shard. Gone before its shard, a tombstone would revive one.
        fsync_folder(folder)
        for tombstones in committed_tombstones(folder):
            store.remove(folder / tombstones.name)
        fsync_folder(folder)
        return Compacted(
            index=fresh_index(store),
            dropped=sum(sidecar.count - int(alive[sidecar.shard]) for sidecar in dirty),
            freed=before - _bytes(folder),
        )


def _bytes(folder: Path) -> int:
    return sum(sidecar.bytes for sidecar in committed_shards(folder))


def _copy_live(index: CacheIndex, old: list[Sidecar], writer: ShardWriter) -> None:
    """Commit new shards with the live samples of these, in the order in which they lie there.

    What an old shard's sidecar knows about colours goes with its first live sample.
    """
    numbers = {index.shards.index(sidecar.shard): sidecar for sidecar in old}
    ordered = index.as_on_disk(np.flatnonzero(np.isin(index.shard_ids, list(numbers))))
    with closing(MemberReader(index)) as reader:
        try:
            for row in map(int, ordered):
                members = {member: reader.raw(row, member) for member in MEMBERS}
                sidecar = numbers.pop(int(index.shard_ids[row]), None)
                rgb = sidecar and sidecar.latent_rgb
                writer.add_members(
                    index.key(row),
                    index.buckets[int(index.bucket_ids[row])],
                    {name: data for name, data in members.items() if data},
                    ColourFit.from_json(rgb) if rgb else None,
                )
            writer.close()
        except BaseException:
            writer.rescue()
            raise


def _delete(store: Store, sidecar: Sidecar) -> None:
    """The sidecar first: a tar without one does not exist, whatever happens in between."""
    tar = store.folder / sidecar.shard
    store.remove(Sidecar.path_for(tar))
    fsync_folder(store.folder)
    store.remove(tar)
