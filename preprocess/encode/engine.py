"""Who runs the encoders: this process (here), or others, such as a cluster's."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from preprocess.cache.text_cache import TextCache
from preprocess.encode.config import EncodeConfig
from preprocess.encode.passes import Encoded, Times, latents_from_media, release_memory, text_pass
from preprocess.encode.validation_prompts import Picture, encode_pictures
from preprocess.encode.work import Work
from preprocess.frames.media_info import MediaError
from preprocess.media.worker_pool import WorkerPool
from shared.format.fingerprint import Fingerprint
from shared.format.schema import DTYPES
from shared.interrupt import Interruption
from shared.models.spec import ModelSpec

if TYPE_CHECKING:  # diffusers and transformers wait until an encoder is built: a run that has
    from preprocess.encode.encoders import LatentEncoder, TextEncoder  # nothing to do needs neither

COMPONENTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
"""Folders of a model that an engine loads."""


class Engine(Protocol):
    """The two passes of `encode`, in order; no device holds a text encoder and a VAE at once."""

    def encode_texts(
        self, captions: Sequence[str], texts: TextCache, *, on_progress: Callable[[], None]
    ) -> None:
        """Bring the embeddings into `texts` that it lacks."""

    def encode_media(
        self, works: Sequence[Work], texts: TextCache
    ) -> Iterator[tuple[Work, Encoded | MediaError | None]]:
        """Encode clips, in any order; one that fails comes with the reason.

        None: its samples are in a shard already. A clip comes with those samples alone that are
        to be written of it.
        """

    def encode_pictures(self, pictures: Sequence[Picture]) -> dict[str, dict[str, torch.Tensor]]:
        """Key of a validation prompt → `cond` (and `clip`), what the model takes of its picture."""

    def rescue(self) -> None:
        """After a signal or a failure: commit what is encoded and not yet in a shard."""


class Elsewhere(Protocol):
    """Where the encoders run if not in this process."""

    @property
    def device(self) -> str:
        """That they compute on."""

    def described(self) -> str:
        """The line about it."""

    def engine(
        self,
        config: EncodeConfig,
        spec: ModelSpec,
        fingerprint: Fingerprint,
        signals: Interruption,
        say: Callable[[str], None],
    ) -> Engine: ...


class LocalEngine:
    """This process: one encoder at a time, decoders beside it."""

    def __init__(
        self, config: EncodeConfig, spec: ModelSpec, pool: WorkerPool, times: Times
    ) -> None:
        self._config, self._spec, self._pool, self._times = config, spec, pool, times

    def encode_texts(
        self, captions: Sequence[str], texts: TextCache, *, on_progress: Callable[[], None]
    ) -> None:
        """Each caption once; the encoder has left memory when this returns."""
        text_pass(
            captions,
            texts,
            lambda: text_encoder(self._config, self._spec),
            stored=DTYPES[self._config.dtype],
            times=self._times,
            on_progress=on_progress,
        )

    def encode_media(
        self, works: Sequence[Work], texts: TextCache
    ) -> Iterator[tuple[Work, Encoded | MediaError | None]]:
        """Clips as they are decoded."""
        return latents_from_media(
            works,
            self._spec,
            lambda: latent_encoder(self._config, self._spec),
            self._pool,
            stored=DTYPES[self._config.dtype],
            times=self._times,
        )

    def encode_pictures(self, pictures: Sequence[Picture]) -> dict[str, dict[str, torch.Tensor]]:
        """With a VAE that has left memory when this returns."""
        return pictures_encoded(self._config, self._spec, pictures)

    def rescue(self) -> None:
        """Nothing: what this process has encoded, `encode` has."""


def text_encoder(config: EncodeConfig, spec: ModelSpec) -> "TextEncoder":
    """Load the text encoder. Imports transformers."""
    from preprocess.encode.encoders import TextEncoder

    dtype = DTYPES[config.text_encoder_dtype]
    return TextEncoder(spec, dtype=dtype, device=config.device)


def latent_encoder(config: EncodeConfig, spec: ModelSpec) -> "LatentEncoder":
    """Load the VAE. Imports diffusers."""
    from preprocess.encode.encoders import LatentEncoder

    return LatentEncoder(spec, dtype=DTYPES[config.vae_dtype], device=config.device)


def pictures_encoded(
    config: EncodeConfig, spec: ModelSpec, pictures: Sequence[Picture]
) -> dict[str, dict[str, torch.Tensor]]:
    """`encode_pictures` in this process; no VAE is built where there are none."""
    if not pictures:
        return {}
    encoder = latent_encoder(config, spec)
    try:
        return encode_pictures(pictures, spec, encoder, stored=DTYPES[config.dtype])
    finally:
        del encoder
        release_memory()
