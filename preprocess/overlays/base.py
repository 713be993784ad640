"""What both kinds of overlay need: a base that stays as it is, a folder beside it to write to."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from preprocess.cache.remove import require_shards
from preprocess.encode.fingerprint import refuse_other_settings
from shared.cache.index import settled_index
from shared.cache.ranks import Rank
from shared.cache.session import CacheSession, Outcome, cache_session
from shared.cache.writer import reader_lock
from shared.format.cache import CacheIndex, Sidecar
from shared.format.fingerprint import Fingerprint
from shared.interrupt import Interruption
from shared.io.store import Store

SHARD_BYTES = 256_000_000


@contextmanager
def base_cache(store: Store) -> Iterator[CacheIndex]:
    """The cache that an overlay is for; nothing of it is compacted away meanwhile.

    Raises UserError where there are no shards.
    """
    require_shards(store)
    with reader_lock(store.folder):
        yield settled_index(store)


def overlay_session(
    store: Store,
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
        refuse_other_settings(store, sidecars, fingerprint, cure=lambda _: cure)
        return fingerprint

    return cache_session(store, rank, signals, outcome, settings)
