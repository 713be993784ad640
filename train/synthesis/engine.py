"""Who runs the experts: this process (here), or others, such as a cluster's."""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from shared.cache.background_writer import BackgroundWriter
from shared.cache.session import CacheSession
from train.options import Expert
from train.synthesis.clips import Group
from train.synthesis.handover import HandedOver, Handover
from train.synthesis.job import Job
from train.synthesis.making import Maker


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one expert does in a run."""

    expert: Expert
    places: range
    """Those of the sampler's levels that are its."""
    groups: Sequence[Group]


class Engine(Protocol):
    """The turns of the experts, one after the other; no device holds two of them at once."""

    def make(
        self, turn: Turn, missing: Set[str], advance: Callable[[int], None]
    ) -> Iterator[Group]:
        """Take groups through the expert's levels and store what it hands over or, of the last
        expert, the clips that are `missing`; gives groups as they are done, in any order.

        `advance` is called with passes as they are done.
        """

    def rescue(self) -> None:
        """After a signal or a failure: commit what is finished and not yet in a shard."""


MakeEngine = Callable[
    [Job, CacheSession, Handover, BackgroundWriter, Callable[[str], None]], Engine
]
"""The last argument says a line."""


@dataclass(frozen=True)
class LocalEngine:
    """This process."""

    job: Job
    session: CacheSession
    handover: Handover
    writer: BackgroundWriter
    say: Callable[[str], None]

    def make(
        self, turn: Turn, missing: Set[str], advance: Callable[[int], None]
    ) -> Iterator[Group]:
        """Groups in their order."""
        maker = Maker(self.job, self.handover)
        with maker.loaded(turn.expert, self.say) as roles:
            for group in turn.groups:
                for clip, made in maker.made(roles, group, turn.places, missing, advance):
                    with self.session.signals.deferred():
                        if isinstance(made, HandedOver):
                            self.handover.put(clip.key, made)
                        else:
                            self.writer.add(made)
                yield group

    def rescue(self) -> None:
        """Nothing: what this process has finished, the writer has."""
