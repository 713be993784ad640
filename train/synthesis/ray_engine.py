"""`wantrain synthesize --engine ray`: the experts on the nodes of a Ray cluster.

The driver decides what is to be made, writes the prompts and derives the index; actors
(`ray_actors`) hold the experts. All of the high-noise expert's are gone before the first of the
low-noise expert comes.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.cache.background_writer import BackgroundWriter
from shared.cache.session import CacheSession, index_there
from shared.cache.writer import MOST_WRITERS, remove_abandoned
from shared.cluster.fleet import Fleet
from shared.cluster.node import mark_output
from shared.cluster.ray_cluster import Cluster
from shared.errors import UserError
from train.synthesis.clips import Group
from train.synthesis.engine import Turn
from train.synthesis.handover import Handover
from train.synthesis.job import Job
from train.synthesis.ray_actors import ExpertActor, Orders


@dataclass(eq=False)
class RayEngine:
    """Actors on a cluster."""

    cluster: Cluster
    job: Job
    session: CacheSession
    handover: Handover
    writer: BackgroundWriter
    """Of the driver: not for clips."""
    say: Callable[[str], None]
    _run: str = field(default_factory=lambda: uuid.uuid4().hex)
    _fleet: Fleet[Group] | None = None

    def make(
        self, turn: Turn, missing: Set[str], advance: Callable[[int], None]
    ) -> Iterator[Group]:
        """Groups as actors are done with them; the actors are gone at the end."""
        passes = len(turn.places) * self.job.sampler.passes_each
        fleet = self._new_fleet(turn, missing)
        for group, reason in fleet.run(turn.groups):
            if reason is not None:
                raise UserError(
                    f"--engine ray: cannot make clip {group.clips[0].key} (or one sampled with "
                    f"it): {reason}"
                )
            advance(len(group.clips) * passes)
            yield group
        remove_abandoned(self.session.store, world=1)  # of actors that died

    def rescue(self) -> None:
        """Let the actors commit, and end them."""
        if self._fleet is not None:
            self._fleet.rescue()

    def _new_fleet(self, turn: Turn, missing: Set[str]) -> Fleet[Group]:
        store, job = self.session.store, self.job
        last = turn.places.stop == len(job.sampler.sigmas)
        mark_output(store, self._run)
        actor = self.cluster.actor(ExpertActor, threads=2)  # one lease, and `finish`

        def hire(number: int) -> Any:
            writer = 1 + (number - 1) % (MOST_WRITERS - 1)  # 0 is the driver's
            return actor.remote(
                Orders(
                    config=job.config,
                    output=store,
                    fingerprint=job.fingerprint,
                    run=self._run,
                    folder=Path.cwd(),
                    expert=turn.expert,
                    places=turn.places,
                    missing=frozenset(missing),
                    first_writer=writer if last else None,
                )
            )

        def uncommitted(groups: Sequence[Group]) -> list[Group]:
            index = index_there(store)
            there = set[str]() if index is None else set(index.hex_keys())
            return [g for g in groups if any(clip.key not in there for clip in g.clips)]

        self._fleet = Fleet(
            hire,
            room=self.cluster.room,
            demand=self.cluster.demand,
            unfinished=uncommitted if last else self.handover.lacking,
            # A group takes longer than its way to an actor, and than loading an expert.
            lease=1,
            in_hand=1,
            worth=1,
            signals=self.session.signals,
            say=self.say,
        )
        return self._fleet
