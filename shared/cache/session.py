"""One writer's time at a folder of shards: what every command that fills one does alike.

    with stoppable(outcome) as signals:  # a signal ends the block early
        with cache_session(store, rank, signals, outcome, settings) as session:
            ...  # what the folder lacks: `session.lacking`
            with session.rescued(writer.rescue):  # whatever ends it, what is encoded is kept
                ...  # the passes; each write is `signals.deferred()`
                session.settle()

An overlay is written to like a cache.
"""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from shared.cache.index import settled_index
from shared.cache.ranks import Rank
from shared.cache.rejected import Rejected, write_rejected
from shared.cache.writer import ShardWriter, refusals_explained, remove_abandoned, writer_lock
from shared.cli.library_log import library_log
from shared.format.cache import CacheIndex, Sidecar, committed_shards
from shared.format.fingerprint import Fingerprint
from shared.interrupt import Interrupted, Interruption, catch_signals
from shared.io.store import Store

KEPT = "What was encoded so far is committed; the same command continues from there."

Missing = TypeVar("Missing", bound=Sized)


@dataclass(kw_only=True)
class Outcome:
    """How a run ended."""

    index: CacheIndex | None = None
    """Of the folder that it wrote to; None where nothing is committed yet."""
    written: int = 0
    """Samples that this run wrote."""
    removed: int = 0
    """Samples that the dataset does not give any more and that were taken out (--prune)."""
    left: int = 0
    """Samples that are not in the shards yet."""
    rejected: list[Rejected] = field(default_factory=list)
    """Listed beside the shards."""
    signum: int | None = None
    """The signal that ended the run early."""

    def reject(self, source: str, reason: object) -> None:
        self.rejected.append(Rejected(source=source, reason=str(reason)))


@contextmanager
def stoppable(outcome: Outcome) -> Iterator[Interruption]:
    """A block that a signal may end early; the outcome then says which."""
    with catch_signals("stopping: committing what is encoded ...") as signals:
        try:
            yield signals
        except Interrupted as interrupted:
            outcome.signum = interrupted.signum


def index_there(store: Store) -> CacheIndex | None:
    """Of what is in the shards now, whoever wrote it; None: nothing."""
    return settled_index(store) if committed_shards(store.folder) else None


@contextmanager
def cache_session(
    store: Store,
    rank: Rank,
    signals: Interruption,
    outcome: Outcome,
    settings: Callable[[list[Sidecar]], Fingerprint],
) -> Iterator["CacheSession"]:
    """The folder for this writer, without what killed ones left; `outcome` gets its index.

    `settings` gives the run's fingerprint as what is committed has it, and raises UserError where
    that was made with other settings. A write that fails becomes a UserError.
    """
    with (
        writer_lock(store.folder, rank.number),
        library_log(store.folder),
        refusals_explained(store.folder, KEPT),
    ):
        remove_abandoned(store, rank.world)
        sidecars = committed_shards(store.folder)
        fingerprint = settings(sidecars)
        outcome.index = index_there(store)
        yield CacheSession(store, rank, signals, outcome, sidecars, fingerprint)


@dataclass
class CacheSession:
    """A folder that is locked for this writer, whose shards have this fingerprint."""

    store: Store
    rank: Rank
    signals: Interruption
    outcome: Outcome
    sidecars: list[Sidecar]
    """Of what was committed when it began."""
    fingerprint: Fingerprint
    _missing: Callable[[CacheIndex | None], Sized] = field(default=lambda index: ())

    def lacking(self, missing: Callable[[CacheIndex | None], Missing]) -> Missing:
        """What the folder lacks of this writer's samples; asked again when the run ends."""
        self._missing = missing
        found = missing(self.outcome.index)
        self.outcome.left = len(found)
        return found

    def writer(self, shard_bytes: int) -> ShardWriter:
        """Of shards that are newer than all that are there."""
        return ShardWriter(
            self.store, self.fingerprint, shard_bytes=shard_bytes, writer=self.rank.number
        )

    def settle(self) -> None:
        """Bring the index, the list of rejected samples and the outcome up to what is committed."""
        write_rejected(self.store, self.rank.number, self.outcome.rejected)
        self.outcome.index = index_there(self.store)
        self.outcome.left = len(self._missing(self.outcome.index))

    @contextmanager
    def rescued(self, *rescues: Callable[[], None]) -> Iterator[None]:
        """A block that ends with all that is encoded committed, also by a signal or a full disk:
        `rescues` commit what can be."""
        try:
            yield
        except BaseException:
            with self.signals.deferred(raise_after=False):
                for rescue in rescues:
                    rescue()
                with suppress(OSError):
                    self.settle()
            raise
