"""`wanprep encode --engine ray`: the two passes of `encode` on the nodes of a Ray cluster.

The driver decides what is to be done and derives the index; actors (`actors`) hold the encoders,
and everything big goes from them into the output folder, which all nodes share. All text actors are
gone before the first media actor comes.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from preprocess.cache.index import settled_index
from preprocess.cache.text_cache import TextCache
from preprocess.cache.writer import MOST_WRITERS, remove_abandoned
from preprocess.cluster.actors import RUN_MARK, MediaActor, Orders, TextActor, encode_pictures_there
from preprocess.cluster.fleet import Fleet
from preprocess.cluster.ray_cluster import Cluster
from preprocess.encode.config import EncodeConfig
from preprocess.encode.passes import Encoded, latents_from_cache
from preprocess.encode.validation_prompts import Picture
from preprocess.encode.work import Captions, Work, committed_of, missing_of
from preprocess.frames.media_info import MediaError
from preprocess.media.sources import Medium
from shared.errors import UserError
from shared.format.cache import CacheIndex, committed_shards
from shared.format.fingerprint import Fingerprint
from shared.interrupt import Interruption
from shared.io.durable import write_bytes
from shared.models.spec import ModelSpec

Item = TypeVar("Item")

# Items that an actor gets at once, and how many must wait before another actor is worth its start.
_CLIPS, _CLIPS_WORTH = 8, 2
_CAPTIONS, _CAPTIONS_WORTH = 32, 256


class RayEngine:
    """Actors on a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        config: EncodeConfig,
        spec: ModelSpec,
        fingerprint: Fingerprint,
        signals: Interruption,
        say: Callable[[str], None],
    ) -> None:
        self._cluster, self._signals, self._say = cluster, signals, say
        self._config, self._spec = config, spec
        self._fingerprint = fingerprint
        self._run = uuid.uuid4().hex
        self._fleet: Fleet[Any] | None = None

    def encode_texts(
        self, captions: Sequence[str], texts: TextCache, *, on_progress: Callable[[], None]
    ) -> None:
        """Each caption once; the actors are gone when this returns."""
        missing = [caption for caption in captions if caption not in texts]
        for _ in range(len(captions) - len(missing)):
            on_progress()

        def unfinished(given: Sequence[str]) -> list[str]:
            return [caption for caption in given if caption not in texts]

        fleet = self._new_fleet(TextActor, None, unfinished, lease=_CAPTIONS, worth=_CAPTIONS_WORTH)
        for caption, reason in fleet.run(missing):
            if reason is not None:
                raise UserError(f"text encoder: cannot encode {caption[:60]!r}: {reason}")
            on_progress()

    def encode_media(
        self, works: Sequence[Work], texts: TextCache
    ) -> Iterator[tuple[Work, Encoded | MediaError | None]]:
        """Clips in any order, as actors are done with them."""
        medium = works[0].entry.path if works else None
        fleet = self._new_fleet(
            MediaActor, medium, self._without_samples, lease=_CLIPS, worth=_CLIPS_WORTH
        )
        rejected: set[int] = set()
        for work, reason in fleet.run(works):
            if reason is not None:
                rejected.add(id(work))
            yield work, None if reason is None else MediaError(reason)
        remove_abandoned(self._config.output, world=1)  # of actors that died
        yield from self._half_committed([work for work in works if id(work) not in rejected])

    def encode_pictures(self, pictures: Sequence[Picture]) -> dict[str, dict[str, torch.Tensor]]:
        """A task on one node: they are few, and the driver's machine may have no GPU."""
        if not pictures:
            return {}
        task: Any = ray.remote(encode_pictures_there).options(
            num_cpus=self._cluster.cpus, num_gpus=self._cluster.gpus
        )
        running = task.remote(self._config, self._spec, Path.cwd(), pictures)
        made: dict[str, dict[str, torch.Tensor]] = ray.get(running)
        return made

    def rescue(self) -> None:
        """Let the actors commit, and end them."""
        if self._fleet is not None:
            self._fleet.rescue()

    def _new_fleet(
        self,
        kind: type,
        medium: Medium | None,
        unfinished: Callable[[Sequence[Item]], Sequence[Item]],
        *,
        lease: int,
        worth: int,
    ) -> Fleet[Item]:
        write_bytes(self._config.output / RUN_MARK, self._run.encode())
        actor: Any = ray.remote(kind).options(
            num_cpus=self._cluster.cpus,
            num_gpus=self._cluster.gpus,
            max_restarts=0,
            max_concurrency=3,  # two leases, and `finish`
            scheduling_strategy="SPREAD",
        )

        def hire(number: int) -> Any:
            return actor.remote(
                Orders(
                    config=self._config,
                    spec=self._spec,
                    fingerprint=self._fingerprint,
                    run=self._run,
                    folder=Path.cwd(),
                    medium=medium,
                    first_writer=1 + (number - 1) % (MOST_WRITERS - 1),  # 0 is the driver's
                )
            )

        fleet: Fleet[Item] = Fleet(
            hire,
            room=self._cluster.room,
            demand=self._cluster.demand,
            unfinished=unfinished,
            lease=lease,
            worth=worth,
            signals=self._signals,
            say=self._say,
        )
        self._fleet = fleet
        return fleet

    def _committed(self) -> tuple[CacheIndex | None, Captions]:
        """What is in the shards now, whoever wrote it."""
        there = committed_shards(self._config.output)
        index = settled_index(self._config.output) if there else None
        return index, committed_of(index)

    def _without_samples(self, works: Sequence[Work]) -> list[Work]:
        """Clips of which nothing is committed. (They had nothing before the run either.)"""
        _, committed = self._committed()
        return [work for work in works if not any(key in committed for key, _ in work.samples)]

    def _half_committed(self, works: Sequence[Work]) -> Iterator[tuple[Work, Encoded]]:
        """Clips whose actor died between two of their captions: the rest, without the VAE."""
        index, committed = self._committed()
        missing = {work.home: missing_of(work, committed) for work in works}
        half = [work for work in works if 0 < len(missing[work.home]) < len(work.samples)]
        if index is not None and half:
            for work, encoded in latents_from_cache(half, index):
                yield replace(work, samples=tuple(missing[work.home])), encoded
