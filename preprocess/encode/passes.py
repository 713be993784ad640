"""The two passes: captions → embeddings on disk, then clips → latents. One encoder at a time."""

import gc
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from preprocess.cache.index import check_shards
from preprocess.cache.text_cache import TextCache
from preprocess.encode.work import Captions, Committed, Work
from preprocess.frames.media_info import MediaError
from preprocess.media.decode import fitted_frames
from preprocess.media.worker_pool import WorkerPool
from shared.format.cache import CacheIndex, MemberReader
from shared.format.columns import caption_digest
from shared.format.latent_rgb import ColourSums
from shared.format.schema import CONDITION_MEMBER, LATENTS_MEMBER, TEXT_MEMBER, Sample
from shared.models.spec import ModelSpec

if TYPE_CHECKING:  # diffusers and transformers wait until an encoder is built
    from preprocess.encode.encoders import LatentEncoder, TextEncoder


@dataclass
class Times:
    """Where the seconds of a run went, as the loop saw them. What overlaps is not in here twice."""

    encoders: float = 0.0
    """In the text encoder and the VAE, without loading them."""
    decoding: float = 0.0
    """Waiting for a clip to be decoded and resized."""
    writing: float = 0.0
    """Waiting for shards to be written."""
    captions: int = 0
    """How many the text encoder took, and the seconds in it."""
    caption_seconds: float = 0.0
    pixels: int = 0
    """Pixels of all frames that the VAE took; the seconds in it, and of waiting for them."""
    media_seconds: float = 0.0
    clips: int = 0
    """That the VAE encoded."""
    vae: float = 0.0
    """Of `encoders`, the VAE's (and CLIP's) part."""
    decoders: float = 0.0
    """What the clips took the decoders, summed over them; beside the VAE, so mostly hidden."""
    media: float = 0.0
    """Wall time from the VAE's being loaded until the last shard is committed."""
    _media_began: float | None = None

    def begin_media(self) -> None:
        """The VAE is loaded."""
        self._media_began = time.perf_counter()

    def end_media(self, *, writing: float) -> None:
        """Every shard is committed; the loop has waited for the writer so many seconds."""
        self.writing = writing
        if self._media_began is not None:
            self.media = time.perf_counter() - self._media_began

    @contextmanager
    def encoding_clip(self) -> Iterator[None]:
        before = self.encoders
        with self.encoding():
            yield
        self.vae += self.encoders - before
        self.clips += 1

    @contextmanager
    def encoding(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.encoders += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.decoding += time.perf_counter() - began


def text_pass(
    captions: Sequence[str],
    texts: TextCache,
    encoder: Callable[[], "TextEncoder"],
    *,
    stored: torch.dtype,
    times: Times,
    on_progress: Callable[[], None],
) -> None:
    """Encode the captions that `texts` lacks. The encoder is built only if there are any, and has
    left memory when this returns.
    """
    missing = [caption for caption in captions if caption not in texts]
    for _ in range(len(captions) - len(missing)):
        on_progress()
    if not missing:
        return
    text_encoder = encoder()
    try:
        for caption in missing:
            began = time.perf_counter()
            with times.encoding():
                text = text_encoder.encode(caption).to(stored)
            times.captions += 1
            times.caption_seconds += time.perf_counter() - began
            texts.put(caption, text)
            on_progress()
    finally:
        del text_encoder
        release_memory()


def release_memory() -> None:
    """Give back what an encoder held, after its last reference is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What the VAE makes of one clip, on the CPU in the dtype of the cache."""

    latents: torch.Tensor | None
    """(C, T, h, w), normalised; None of a caption without a medium."""
    condition: dict[str, torch.Tensor] | None
    """`cond` (C, T, h, w), normalised, and of Wan 2.1 `clip` (tokens, D); None but for i2v."""
    colours: Callable[[], ColourSums] | None = None
    """Computes the sums for the latent → RGB map; None where the latents come from a shard."""


def samples_of(
    work: Work, wanted: Sequence[tuple[str, str]], encoded: Encoded, texts: TextCache
) -> Iterator[tuple[Sample, Callable[[], ColourSums] | None]]:
    """The samples of an encoded clip, one per (key, caption) of `wanted`.

    Its colours come with the first: they are of the clip, and count once.
    """
    colours = encoded.colours
    for key, caption in wanted:
        sample = Sample(
            key=key,
            info=work.info(caption),
            latents=encoded.latents,
            text=texts.get(caption),
            **(encoded.condition or {}),
        )
        yield sample, colours
        colours = None


def latents_from_cache(work: Sequence[Work], cache: CacheIndex) -> Iterator[tuple[Work, Encoded]]:
    """Clips of which some caption is committed already: the latents of that sample, as stored."""
    rows = {key: row for row, key in enumerate(cache.hex_keys())} if work else {}
    reader = MemberReader(cache)
    copied = [rows[key] for item in work for key, _ in item.samples if key in rows]
    used = {cache.shards[int(cache.shard_ids[row])] for row in copied}
    check_shards(cache.folder, used)  # damage must not be copied under a fresh checksum
    try:
        for item in work:
            row = next(rows[key] for key, _ in item.samples if key in rows)
            latents = reader.read(row, LATENTS_MEMBER)
            assert latents is not None, "build_index refuses samples without latents"
            condition = reader.read(row, CONDITION_MEMBER)
            yield item, Encoded(latents=latents["latents"], condition=condition)
    finally:
        reader.close()


def texts_from_cache(
    work: Sequence[Work], committed: Captions, cache: CacheIndex, texts: TextCache
) -> None:
    """Put the embeddings of committed samples into `texts` that are to be written anew.

    Their caption is the same: something else about them has changed.
    """
    same = {
        key: caption
        for item in work
        for key, caption in item.samples
        if (there := committed.get(key)) is not None
        and there != Committed(there.caption, item.repeats)
        and there.caption == caption_digest(caption)
    }
    if not same:
        return
    rows = {key: row for row, key in enumerate(cache.hex_keys()) if key in same}
    check_shards(cache.folder, {cache.shards[int(cache.shard_ids[row])] for row in rows.values()})
    reader = MemberReader(cache)
    try:
        for key, row in rows.items():
            text = reader.read(row, TEXT_MEMBER)
            if text is not None and same[key] not in texts:
                texts.put(same[key], text["text"])
    finally:
        reader.close()


def latents_from_media(
    work: Sequence[Work],
    spec: ModelSpec,
    encoder: Callable[[], "LatentEncoder"],
    pool: WorkerPool,
    *,
    stored: torch.dtype,
    times: Times,
) -> Generator[tuple[Work, Encoded | MediaError], None, None]:
    """Decode, fit and encode clips, as they are decoded; a clip that fails comes with the reason.

    The VAE is built only if there is work; the next clips are decoded while it is busy. Adds to
    `times` what it waits and computes.
    """
    if not work:
        return
    tasks = (
        (
            item,
            (item.entry.path, item.type, item.clip.frame_indices, item.clip.bucket, item.shortcut),
        )
        for item in work
    )
    # One more than there are workers to have a clip ready, one more again for a worker that hangs.
    decoded = pool.completed(
        fitted_frames, tasks, source=lambda item: item.entry.path, ahead=pool.workers + 2
    )
    busy = pool.busy
    with closing(decoded):
        latent_encoder = encoder()
        times.begin_media()
        while True:
            began = time.perf_counter()
            with times.waiting():
                item, frames = next(decoded, (None, None))
            if item is None or frames is None:
                times.decoders += pool.busy - busy
                return
            try:
                with times.encoding_clip():
                    encoded = _encode(latent_encoder, frames.result(), spec, stored)
                bucket = item.clip.bucket
                times.pixels += bucket.height * bucket.width * bucket.frames
                times.media_seconds += time.perf_counter() - began
                yield item, encoded
            except MediaError as error:
                yield item, error
            del frames  # a clip's memory, not held while the next is awaited


def _encode(
    encoder: "LatentEncoder", frames: npt.NDArray[np.uint8], spec: ModelSpec, stored: torch.dtype
) -> Encoded:
    latents = encoder.latents(frames)
    condition = encoder.condition(frames) if spec.mode == "i2v" else None
    for tensor in (latents, *(condition or {}).values()):
        if not bool(torch.isfinite(tensor).all()):
            raise MediaError("the VAE gave NaN or infinite values; try --vae-dtype fp32")
    latents = latents.to(stored)
    return Encoded(
        latents=latents,
        condition=condition and {name: part.to(stored) for name, part in condition.items()},
        colours=partial(ColourSums.of, frames, latents),
    )
