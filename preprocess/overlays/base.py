"""What both kinds of overlay need: a base that stays as it is, a folder beside it to write to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preprocess.cache.index import settled_index
from preprocess.cache.remove import require_shards
from preprocess.cache.writer import (
    reader_lock,
    refusals_explained,
    remove_abandoned,
    writer_lock,
)
from preprocess.encode.fingerprint import refuse_other_settings
from shared.format.cache import CacheIndex, committed_shards
from shared.format.fingerprint import Fingerprint


@contextmanager
def base_cache(folder: Path) -> Iterator[CacheIndex]:
    """The cache that an overlay is for; nothing of it is compacted away meanwhile.

    Raises UserError where there are no shards.
    """
    require_shards(folder)
    with reader_lock(folder):
        yield settled_index(folder)


@contextmanager
def overlay_to_write(
    folder: Path, fingerprint: Fingerprint, *, writer: int, world: int, cure: str
) -> Iterator[CacheIndex | None]:
    """An overlay's folder for this writer: what is committed in it, None where nothing is.

    Raises UserError, which ends with `cure`, where it was made with other settings.
    """
    kept = "What was encoded so far is committed; the same command goes on from there."
    with writer_lock(folder, writer), refusals_explained(folder, kept):
        remove_abandoned(folder, world)
        sidecars = committed_shards(folder)
        refuse_other_settings(folder, sidecars, fingerprint, cure=lambda _: cure)
        yield settled_index(folder) if sidecars else None
