"""What runs on the nodes: one actor holds one encoder and does the work of `passes` with it.

A media actor writes the shards itself, under a writer number of its own, so no tensor travels. It
decodes one lease while it encodes another (Ray calls `work` in threads).
"""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.cache.text_cache import TextCache
from preprocess.encode.config import EncodeConfig
from preprocess.encode.engine import COMPONENTS, latent_encoder, pictures_encoded, text_encoder
from preprocess.encode.fingerprint import encode_fingerprint
from preprocess.encode.passes import latents_from_media, samples_of
from preprocess.encode.speed import Times
from preprocess.encode.validation_prompts import Conditions, Picture
from preprocess.encode.work import Work
from preprocess.frames.media_info import MediaError
from preprocess.media.sources import MediaFile
from preprocess.media.worker_pool import WorkerPool
from shared.cache.background_writer import BackgroundWriter
from shared.cache.writer import ShardWriter, free_writer_lock
from shared.cluster.fleet import Joined
from shared.cluster.node import check_folders, errors_of_this_node, joined
from shared.device import take_device
from shared.errors import UserError
from shared.format.fingerprint import Fingerprint, as_in_cache, refuse_differences
from shared.format.schema import DTYPES
from shared.io.hashing import FileHasher
from shared.io.store import Store
from shared.models.spec import ModelSpec, resolve_model

if TYPE_CHECKING:
    from preprocess.encode.encoders import LatentEncoder, TextEncoder


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What an actor gets when it is created."""

    config: EncodeConfig
    """Of the driver, with the device decided."""
    output: Store
    spec: ModelSpec
    """Of the model as the driver sees it."""
    fingerprint: Fingerprint
    run: str
    """That the output folder is marked with."""
    folder: Path
    """Where the driver runs: what relative paths begin at."""
    media_file: MediaFile | None
    """One that every node must see."""
    first_writer: int
    """The writer number that is tried first."""


class TextActor:
    """Captions → embeddings, into the text cache that lies in the output folder."""

    LEASE, WORTH = 32, 256
    """Captions that one gets at once, and that must wait before another is worth its start."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._texts = TextCache(orders.output.folder, orders.fingerprint)
        self._encoder: TextEncoder | None = None

    def start(self) -> Joined:
        """Check the node and load the encoder. UserError where the node cannot be used."""
        spec = _checked_node(self._orders)
        config = self._orders.config
        self._encoder = text_encoder(spec, config.text_encoder_dtype, config.device)
        return joined(writer=None)

    def work(self, captions: Sequence[str]) -> dict[int, str]:
        """Encode captions; none is ever rejected."""
        assert self._encoder is not None, "start comes first"
        for caption in captions:
            text = self._encoder.encode(caption).to(DTYPES[self._orders.config.dtype])
            self._texts.put(caption, text)
        return {}

    def finish(self, rescue: bool) -> None:
        """Nothing: an embedding is on disk as soon as it is made."""


class MediaActor:
    """Clips → shards, with the embeddings that text actors left."""

    LEASE, WORTH = 8, 2
    """Clips, as of a `TextActor`."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._texts = TextCache(orders.output.folder, orders.fingerprint)
        self._held = ExitStack()
        self._turn = threading.Lock()
        """Held while the encoder and the writer are used."""
        self._stopping = threading.Event()

    def start(self) -> Joined:
        """Check the node, take a writer number, load the VAE. UserError: it cannot be used."""
        config = self._orders.config
        self._spec = _checked_node(self._orders)
        self._pool = self._held.enter_context(
            WorkerPool(config.workers, timeout=config.decode_timeout)
        )
        number = self._held.enter_context(
            free_writer_lock(self._orders.output.folder, self._orders.first_writer)
        )
        shards = ShardWriter(
            self._orders.output,
            self._orders.fingerprint,
            shard_bytes=config.shard_size_mb * 1_000_000,
            writer=number,
        )
        self._writer = BackgroundWriter(shards)
        self._encoder = latent_encoder(self._spec, config.vae_dtype, config.device)
        return joined(writer=number)

    def work(self, works: Sequence[Work]) -> dict[int, str]:
        """Encode clips into shards; which were rejected (position), and why.

        Their samples are committed when a shard is full, or by `finish`.
        """
        numbers = {id(work): number for number, work in enumerate(works)}
        rejected: dict[int, str] = {}
        with ExitStack() as turn:

            def encoder() -> "LatentEncoder":  # asked for once the first clips are being decoded
                turn.enter_context(self._turn)
                return self._encoder

            encoded = latents_from_media(
                works,
                self._spec,
                encoder,
                self._pool,
                stored=DTYPES[self._orders.config.dtype],
                times=Times(),
            )
            with closing(encoded):
                for work, result in encoded:
                    if self._stopping.is_set():
                        break
                    if isinstance(result, MediaError):
                        rejected[numbers[id(work)]] = str(result)
                        continue
                    for sample, frames in samples_of(work, work.samples, result, self._texts):
                        self._writer.add(sample, frames)
        return rejected

    def finish(self, rescue: bool) -> None:
        """Commit open shards, after the clip that is being encoded, and let go of everything.

        `rescue`: the run has failed or was stopped; commit what can be.
        """
        self._stopping.set()
        with self._turn:
            if rescue:
                self._writer.rescue()
            else:
                self._writer.close()
        self._held.close()


def _checked_node(orders: Orders) -> ModelSpec:
    """The model as this node sees it, once the node is known to see what the driver sees."""
    with errors_of_this_node():
        # Before the decoders start, which inherit the working directory.
        check_folders(orders.folder, orders.output, orders.run)
        if orders.media_file is not None and not orders.media_file.exists():
            raise UserError(
                f"--train-data-dir: {orders.media_file} is not there. Expected the media under the "
                "same path on every node."
            )
        spec = replace(orders.spec, folder=resolve_model(orders.config.model, COMPONENTS))
        take_device(orders.config.device)
        hasher = FileHasher()
        own = encode_fingerprint(orders.config, spec, hasher)
        refuse_differences(
            as_in_cache(own, orders.fingerprint, spec.folder, hasher),
            orders.fingerprint,
            what=f"the model in {spec.folder} is another one there, or another wandistill",
            cure="Copy the model to that node again, and install the same version.",
        )
        return spec


def encode_pictures_there(
    config: EncodeConfig, spec: ModelSpec, folder: Path, pictures: Sequence[Picture]
) -> Conditions:
    """`pictures_encoded` on a node; relative paths begin at `folder`."""
    os.chdir(folder)
    there = replace(spec, folder=resolve_model(config.model, COMPONENTS))
    return pictures_encoded(config, there, pictures)
