"""What runs on the nodes: one actor holds one expert and takes groups of clips through its levels.

What it hands over, or the shards under a writer number of its own, it writes itself, so no tensor
travels.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.cache.background_writer import BackgroundWriter
from shared.cache.writer import ShardWriter, free_writer_lock
from shared.cluster.fleet import Joined
from shared.cluster.node import check_folders, errors_of_this_node, joined
from shared.device import full_device_explained
from shared.errors import UserError
from shared.format.fingerprint import Fingerprint, refuse_differences
from shared.io.store import Store
from train.options import Expert
from train.synthesis.clips import Group
from train.synthesis.config import SynthesizeConfig
from train.synthesis.handover import HandedOver, Handover
from train.synthesis.job import FULL_DEVICE, read_job, use_device
from train.synthesis.making import Maker


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What an actor gets when it is created."""

    config: SynthesizeConfig
    """Of the driver, with the device decided."""
    output: Store
    fingerprint: Fingerprint
    run: str
    """That the output folder is marked with."""
    folder: Path
    """Where the driver runs: what relative paths begin at."""
    expert: Expert
    places: range
    """Those of the sampler's levels that are the expert's."""
    missing: frozenset[str]
    """Keys of the clips that go into shards."""
    first_writer: int | None
    """The writer number that is tried first; None where the expert hands over."""


class ExpertActor:
    """Groups of clips → hand-over files, or shards."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._handover = Handover(orders.output.folder, orders.fingerprint)
        self._writer: BackgroundWriter | None = None
        self._held = ExitStack()
        self._turn = threading.Lock()
        """Held while the expert and the writer are used."""
        self._stopping = threading.Event()

    def start(self) -> Joined:
        """Check the node, take a writer number if one is needed, load the expert. UserError where
        the node cannot be used."""
        orders = self._orders
        with errors_of_this_node():
            check_folders(orders.folder, orders.output, orders.run)
            job = read_job(orders.config)
            refuse_differences(
                job.fingerprint,
                orders.fingerprint,
                what=f"the model in {job.spec.folder}, or the shards in {job.source.data.folders}, "
                "are others there, or another wandistill",
                cure="Copy them to that node again, and install the same version.",
            )
            use_device(job.config, job.device)
            number = None if orders.first_writer is None else self._take_writer(orders.first_writer)
            self._device = job.device
            self._clips = {clip.key: clip for group in job.groups for clip in group.clips}
            self._maker = Maker(job, self._handover)
            with full_device_explained(job.device, lambda: FULL_DEVICE):
                self._roles = self._held.enter_context(
                    self._maker.loaded(orders.expert, lambda line: None)
                )
        return joined(writer=number)

    def _take_writer(self, first: int) -> int:
        orders = self._orders
        number = self._held.enter_context(free_writer_lock(orders.output.folder, first))
        shards = ShardWriter(
            orders.output,
            orders.fingerprint,
            shard_bytes=orders.config.shard_size_mb * 1_000_000,
            writer=number,
        )
        self._writer = BackgroundWriter(shards)
        return number

    def work(self, groups: Sequence[Group]) -> dict[int, str]:
        """Take groups through the expert's levels; none is ever rejected.

        What goes into a shard is committed when that is full, or by `finish`.
        """
        with (
            errors_of_this_node(),
            full_device_explained(self._device, lambda: FULL_DEVICE),
            self._turn,
            torch.no_grad(),  # of this thread: Ray may call `start` in another
        ):
            for group in groups:
                try:
                    self._make(self._as_seen_here(group))
                except _Stopped:
                    break
        return {}

    def _make(self, group: Group) -> None:
        orders = self._orders
        made = self._maker.made(self._roles, group, orders.places, orders.missing, self._advance)
        for clip, result in made:
            if isinstance(result, HandedOver):
                self._handover.put(clip.key, result)
            else:
                assert self._writer is not None, "the last expert has one"
                self._writer.add(result)

    def _advance(self, passes: int) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _as_seen_here(self, group: Group) -> Group:
        """With the rows that the samples have where this actor has read them: the source may have
        grown since the run began. UserError where one is gone."""
        try:
            return Group(tuple(self._clips[clip.key] for clip in group.clips), group.bucket)
        except KeyError as error:
            raise UserError(
                f"--shards: {self._orders.config.shards[0].path} has changed since the run began. "
                "Run the same command again."
            ) from error

    def finish(self, rescue: bool) -> None:
        """Commit open shards and let go of everything; what is being sampled is given up.

        `rescue`: the run has failed or was stopped; commit what can be.
        """
        self._stopping.set()
        with self._turn:
            if self._writer is not None and rescue:
                self._writer.rescue()
            elif self._writer is not None:
                self._writer.close()
            self._held.close()


class _Stopped(Exception):
    """The run ends before the group is done."""
