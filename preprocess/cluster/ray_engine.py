"""`wanprep encode --engine ray`: the two passes of `encode` on the nodes of a Ray cluster.

The driver decides what is to be done and derives the index; actors (`actors`) hold the encoders,
and everything big goes from them into the output folder, which all nodes share. All text actors are
gone before the first media actor comes.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from preprocess.cache.text_cache import TextCache
from preprocess.cluster.actors import MediaActor, Orders, TextActor, encode_pictures_there
from preprocess.encode.config import EncodeConfig
from preprocess.encode.engine import Write
from preprocess.encode.passes import latents_from_cache
from preprocess.encode.validation_prompts import Conditions, Picture
from preprocess.encode.work import Work, committed_of, missing_of
from preprocess.frames.media_info import MediaError
from preprocess.media.sources import MediaFile
from shared.cache.session import index_there
from shared.cache.writer import MOST_WRITERS, remove_abandoned
from shared.cluster.fleet import Fleet
from shared.cluster.node import mark_output
from shared.cluster.ray_cluster import Cluster
from shared.errors import UserError
from shared.format.fingerprint import Fingerprint
from shared.interrupt import Interruption
from shared.io.store import Store
from shared.models.spec import ModelSpec

Item = TypeVar("Item")

_IN_HAND = 2
"""Leases of an actor: one that is encoded, one that is being decoded."""


@dataclass(eq=False)
class RayEngine:
    """Actors on a cluster."""

    cluster: Cluster
    config: EncodeConfig
    output: Store
    spec: ModelSpec
    fingerprint: Fingerprint
    signals: Interruption
    say: Callable[[str], None]
    _run: str = field(default_factory=lambda: uuid.uuid4().hex)
    _fleet: Fleet[Any] | None = None

    def encode_texts(self, captions: Sequence[str], texts: TextCache) -> Iterator[str]:
        """Each caption once; the actors are gone at the end."""

        def missing(given: Sequence[str]) -> list[str]:
            return [caption for caption in given if caption not in texts]

        todo = missing(captions)
        yield from set(captions).difference(todo)
        fleet = self._new_fleet(TextActor, None, missing)
        for caption, reason in fleet.run(todo):
            if reason is not None:
                raise UserError(f"text encoder: cannot encode {caption[:60]!r}: {reason}")
            yield caption

    def encode_media(
        self, works: Sequence[Work], write: Write
    ) -> Iterator[tuple[Work, MediaError | None]]:
        """Clips in any order, as actors are done with them."""
        media_file = works[0].entry.path if works else None
        fleet = self._new_fleet(MediaActor, media_file, self._without_samples)
        encoded = []
        for work, reason in fleet.run(works):
            if reason is None:
                encoded.append(work)
            yield work, None if reason is None else MediaError(reason)
        remove_abandoned(self.output, world=1)  # of actors that died
        self._complete(encoded, write)

    def encode_pictures(self, pictures: Sequence[Picture]) -> Conditions:
        """A task on one node: they are few, and the driver's machine may have no GPU."""
        if not pictures:
            return {}
        task: Any = ray.remote(encode_pictures_there).options(
            num_cpus=self.cluster.cpus, num_gpus=self.cluster.gpus
        )
        made: Conditions = ray.get(task.remote(self.config, self.spec, Path.cwd(), pictures))
        return made

    def rescue(self) -> None:
        """Let the actors commit, and end them."""
        if self._fleet is not None:
            self._fleet.rescue()

    def _new_fleet(
        self,
        kind: type[TextActor] | type[MediaActor],
        media_file: MediaFile | None,
        unfinished: Callable[[Sequence[Item]], Sequence[Item]],
    ) -> Fleet[Item]:
        mark_output(self.output, self._run)
        actor = self.cluster.actor(kind, threads=_IN_HAND + 1)  # and `finish`

        def hire(number: int) -> Any:
            return actor.remote(
                Orders(
                    config=self.config,
                    output=self.output,
                    spec=self.spec,
                    fingerprint=self.fingerprint,
                    run=self._run,
                    folder=Path.cwd(),
                    media_file=media_file,
                    first_writer=1 + (number - 1) % (MOST_WRITERS - 1),  # 0 is the driver's
                )
            )

        fleet: Fleet[Item] = Fleet(
            hire,
            room=self.cluster.room,
            demand=self.cluster.demand,
            unfinished=unfinished,
            lease=kind.LEASE,
            in_hand=_IN_HAND,
            worth=kind.WORTH,
            signals=self.signals,
            say=self.say,
        )
        self._fleet = fleet
        return fleet

    def _without_samples(self, works: Sequence[Work]) -> list[Work]:
        """Clips of which nothing is committed. (They had nothing before the run either.)"""
        committed = committed_of(index_there(self.output))
        return [work for work in works if not any(key in committed for key, _ in work.samples)]

    def _complete(self, works: Sequence[Work], write: Write) -> None:
        """Write the rest of clips whose actor died between two of their captions: no VAE needed."""
        index = index_there(self.output)
        committed = committed_of(index)
        missing = {work.home: missing_of(work, committed) for work in works}
        half = [work for work in works if 0 < len(missing[work.home]) < len(work.samples)]
        if index is not None and half:
            for work, encoded in latents_from_cache(half, index):
                write(replace(work, samples=tuple(missing[work.home])), encoded)
