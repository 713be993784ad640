"""Taking samples out of a cache: which ones, by key, by the name of their file, by a dataset."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from preprocess.index import fresh_index
from preprocess.writer import ShardWriter, output_lock, refusals_explained
from shared.cache import CacheIndex, MemberReader, committed_shards
from shared.errors import UserError
from shared.schema import MEDIA_TYPES

KEY = re.compile(r"[0-9a-f]{32}")


def require_shards(folder: Path) -> None:
    """UserError where there is no cache, so that no folder is made by looking for one."""
    if not folder.is_dir() or not committed_shards(folder):
        raise UserError(
            f"--shards: no shards in {folder}. Make some: wanprep encode --output {folder}"
        )


def sources(index: CacheIndex, rows: Iterable[int]) -> dict[str, str]:
    """Key → `source` of some rows, from the shards themselves."""
    reader = MemberReader(index)
    try:
        return {index.key(row): str(reader.info(row)["source"]) for row in rows}
    finally:
        reader.close()


def unlisted(index: CacheIndex, live: Collection[str], unusable: Collection[str]) -> list[str]:
    """Keys of the cache that are not `live`.

    Samples of `unusable` files, or in `unusable` tars, are left alone: a disk that is not mounted
    today is no reason to throw away what was encoded from it.
    """
    rows = [row for row, key in enumerate(index.hex_keys()) if key not in live]

    def usable(source: str) -> bool:
        at = PurePosixPath(source)  # of what lies in a tar, the tar may be what is unusable
        return source not in unusable and not any(str(above) in unusable for above in at.parents)

    return [key for key, source in sources(index, rows).items() if usable(source)]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What `remove` found, or took out."""

    sources: dict[str, str]
    """Key → source."""
    index: CacheIndex
    """Of the cache as it is now."""


def remove(folder: Path, wanted: Sequence[str], *, dry_run: bool) -> Removed:
    """Take samples out of the cache, named by key or by a pattern of their source.

    Nothing is written in a dry run, and nothing where one of the names fits no sample (UserError).
    """
    require_shards(folder)
    with output_lock(folder):
        with refusals_explained(folder, "Nothing was removed."):
            index = fresh_index(folder)
        rows = {key: row for row, key in enumerate(index.hex_keys())}
        names = sources(index, rows.values()) if not all(map(KEY.fullmatch, wanted)) else None
        chosen: dict[str, None] = {}
        for name in wanted:
            fits = [name] if name in rows else []
            if names is not None and not fits:
                fits = [key for key, source in names.items() if fnmatchcase(source, name)]
            if not fits:
                raise UserError(
                    f"remove: {name!r} is no key and fits no source of the {len(index)} samples "
                    f"in {folder}. Sources are named as in the dataset, e.g. "
                    f"{_example(index)!r}; quote patterns, so that the shell leaves them alone."
                )
            chosen |= dict.fromkeys(fits)
        found = sources(index, [rows[key] for key in chosen])
        if not dry_run:
            with refusals_explained(folder, "Nothing was removed."):
                writer = ShardWriter(folder, index.fingerprint, shard_bytes=1)
                writer.add_tombstones(chosen)
            kept = f"The samples are removed, the index is old: wanprep index --shards {folder}"
            with refusals_explained(folder, kept):
                index = fresh_index(folder)
    return Removed(sources=found, index=index)


def _example(index: CacheIndex) -> str:
    media = np.flatnonzero(index.types != MEDIA_TYPES.index("text"))  # the others have no source
    return next(iter(sources(index, map(int, media[:1])).values()), "clips/a.mp4")
