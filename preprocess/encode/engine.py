"""Who runs the encoders: this process (here), or others, such as a cluster's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from preprocess.cache.text_cache import TextCache
from preprocess.encode.config import EncodeConfig
from preprocess.encode.passes import Encoded, latents_from_media, release_memory, text_pass
from preprocess.encode.speed import Times
from preprocess.encode.validation_prompts import Conditions, Picture
from preprocess.encode.work import Work
from preprocess.frames.media_info import MediaError
from preprocess.media.worker_pool import WorkerPool
from shared.format.fingerprint import Fingerprint
from shared.format.schema import DTYPES
from shared.interrupt import Interruption
from shared.io.store import Store
from shared.models.spec import ModelSpec

if TYPE_CHECKING:  # diffusers and transformers wait until an encoder is built: a run that has
    from preprocess.encode.encoders import LatentEncoder, TextEncoder  # nothing to do needs neither

COMPONENTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
"""Folders of a model that an engine loads."""


Write = Callable[[Work, Encoded], None]
"""Writes what a clip lacks in the shards."""


class Engine(Protocol):
    """The two passes of `encode`, in order; no device holds a text encoder and a VAE at once."""

    def encode_texts(self, captions: Sequence[str], texts: TextCache) -> Iterator[str]:
        """Bring the embeddings into `texts` that it lacks; gives captions as they are there."""

    def encode_media(
        self, works: Sequence[Work], write: Write
    ) -> Iterator[tuple[Work, MediaError | None]]:
        """Encode clips into shards, in any order; one that fails comes with the reason.

        `write` is called with what this process has to write; others may write themselves.
        """

    def encode_pictures(self, pictures: Sequence[Picture]) -> Conditions:
        """What the model takes of each picture."""

    def rescue(self) -> None:
        """After a signal or a failure: commit what is encoded and not yet in a shard."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Where the encoders run if not in this process."""

    device: str
    """That they compute on."""
    described: str
    """The line about it."""
    engine: Callable[
        [EncodeConfig, Store, ModelSpec, Fingerprint, Interruption, Callable[[str], None]], Engine
    ]
    """Makes the engine; the last argument says a line."""


@dataclass(frozen=True)
class LocalEngine:
    """This process: one encoder at a time, decoders beside it."""

    config: EncodeConfig
    spec: ModelSpec
    pool: WorkerPool
    times: Times

    def encode_texts(self, captions: Sequence[str], texts: TextCache) -> Iterator[str]:
        """Each caption once; the encoder has left memory at the end."""
        config = self.config
        encoder = partial(text_encoder, self.spec, config.text_encoder_dtype, config.device)
        stored = DTYPES[config.dtype]
        return text_pass(captions, texts, encoder, stored=stored, times=self.times)

    def encode_media(
        self, works: Sequence[Work], write: Write
    ) -> Iterator[tuple[Work, MediaError | None]]:
        """Clips as they are decoded."""
        config = self.config
        encoder = partial(latent_encoder, self.spec, config.vae_dtype, config.device)
        stored = DTYPES[config.dtype]
        for work, result in latents_from_media(
            works, self.spec, encoder, self.pool, stored=stored, times=self.times
        ):
            if isinstance(result, MediaError):
                yield work, result
            else:
                write(work, result)
                yield work, None

    def encode_pictures(self, pictures: Sequence[Picture]) -> Conditions:
        """With a VAE that has left memory when this returns."""
        return pictures_encoded(self.config, self.spec, pictures)

    def rescue(self) -> None:
        """Nothing: what this process has encoded, `encode` has."""


def text_encoder(spec: ModelSpec, compute: str, device: str) -> "TextEncoder":
    """Load the text encoder of a model. Imports transformers."""
    from preprocess.encode.encoders import TextEncoder

    return TextEncoder(spec, dtype=DTYPES[compute], device=device)


def latent_encoder(spec: ModelSpec, compute: str, device: str) -> "LatentEncoder":
    """Load the VAE. Imports diffusers."""
    from preprocess.encode.encoders import LatentEncoder

    return LatentEncoder(spec, dtype=DTYPES[compute], device=device)


def pictures_encoded(
    config: EncodeConfig, spec: ModelSpec, pictures: Sequence[Picture]
) -> Conditions:
    """`encode_pictures` in this process, on the CPU; no VAE is built where there are none."""
    made: Conditions = {}
    if not pictures:
        return made
    encoder = latent_encoder(spec, config.vae_dtype, config.device)
    try:
        for one in pictures:
            if spec.mode == "ti2v":
                condition = {"cond": encoder.latents(one.given)}
            else:  # of the frames between only their number counts
                frames = np.repeat(one.given[:1], one.bucket.frames, axis=0)
                frames[-1:] = one.given[-1:]
                condition = encoder.condition(frames)
            stored = DTYPES[config.dtype]
            made[one.key] = {name: part.to(stored) for name, part in condition.items()}
        return made
    finally:
        del encoder
        release_memory()
