"""What both kinds of overlay need: a base that stays as it is, a folder beside it to write to."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from preprocess.cache.index import settled_index
from preprocess.cache.ranks import Rank
from preprocess.cache.remove import require_shards
from preprocess.cache.writer import reader_lock
from preprocess.encode.fingerprint import refuse_other_settings
from preprocess.encode.session import CacheSession, Outcome, cache_session
from shared.format.cache import CacheIndex, Sidecar
from shared.format.fingerprint import Fingerprint
from shared.interrupt import Interruption

SHARD_BYTES = 256_000_000


@contextmanager
def base_cache(folder: Path) -> Iterator[CacheIndex]:
    """The cache that an overlay is for; nothing of it is compacted away meanwhile.

    Raises UserError where there are no shards.
    """
    require_shards(folder)
    with reader_lock(folder):
        yield settled_index(folder)


def overlay_session(
    folder: Path,
    rank: Rank,
    signals: Interruption,
    outcome: Outcome,
    fingerprint: Fingerprint,
    *,
    cure: str,
) -> AbstractContextManager[CacheSession]:
    """`cache_session` of an overlay.

    Raises UserError, which ends with `cure`, where it was made with other settings.
    """

    def settings(sidecars: list[Sidecar]) -> Fingerprint:
        refuse_other_settings(folder, sidecars, fingerprint, cure=lambda _: cure)
        return fingerprint

    return cache_session(folder, rank, signals, outcome, settings)
