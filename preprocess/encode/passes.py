"""The two passes: captions → embeddings on disk, then clips → latents. One encoder at a time."""

import gc
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from preprocess.cache.text_cache import TextCache
from preprocess.encode.speed import Times
from preprocess.encode.work import Captions, Work, missing_of
from preprocess.frames.media_info import MediaError
from preprocess.media.decode import fitted_frames
from preprocess.media.worker_pool import WorkerPool
from shared.cache.index import check_shards
from shared.format.cache import CacheIndex, MemberReader
from shared.format.columns import caption_digest
from shared.format.schema import CONDITION_MEMBER, LATENTS_MEMBER, TEXT_MEMBER, Sample
from shared.models.spec import ModelSpec

Clip = TypeVar("Clip")
Result = TypeVar("Result")
Frames = npt.NDArray[np.uint8]
"""(F, H, W, 3), RGB, as every encoder gets them."""

if TYPE_CHECKING:  # diffusers and transformers wait until an encoder is built
    from preprocess.encode.encoders import LatentEncoder, TextEncoder


def text_pass(
    captions: Sequence[str],
    texts: TextCache,
    encoder: Callable[[], "TextEncoder"],
    *,
    stored: torch.dtype,
    times: Times,
) -> Iterator[str]:
    """Encode the captions that `texts` lacks; gives all as they are there. The encoder is built
    only if any are missing, and has left memory at the end.
    """
    missing = [caption for caption in captions if caption not in texts]
    yield from set(captions).difference(missing)
    if not missing:
        return
    text_encoder = encoder()
    try:
        for caption in missing:
            with times.text:
                text = text_encoder.encode(caption).to(stored)
            times.captions += 1
            texts.put(caption, text)
            yield caption
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
    """(C, T, h, w), normalised; None if text-only."""
    condition: dict[str, torch.Tensor]
    """`cond` or `first_last` (C, T, h, w), normalised, and of Wan 2.1 `clip` (tokens, D); empty
    where only latents are encoded."""
    frames: Frames | None = None
    """(F, H, W, 3), which the latents are of; None where those come from a shard."""


def samples_of(
    work: Work, wanted: Sequence[tuple[str, str]], encoded: Encoded, texts: TextCache
) -> Iterator[tuple[Sample, Frames | None]]:
    """The samples of an encoded clip, one per (key, caption) of `wanted`, for `ShardWriter.add`.

    Its frames come with the first: what is summed up of them is of the clip, and counts once.
    """
    frames = encoded.frames
    for key, caption in wanted:
        sample = Sample(
            key=key,
            info=work.info(caption),
            latents=encoded.latents,
            text=texts.get(caption),
            **encoded.condition,
        )
        yield sample, frames
        frames = None


def latents_from_cache(work: Sequence[Work], cache: CacheIndex) -> Iterator[tuple[Work, Encoded]]:
    """Clips of which some caption is committed already: the latents of that sample, as stored."""
    rows = {key: row for row, key in enumerate(cache.hex_keys())} if work else {}
    _check_copied(cache, [rows[key] for item in work for key, _ in item.samples if key in rows])
    with closing(MemberReader(cache)) as reader:
        for item in work:
            row = next(rows[key] for key, _ in item.samples if key in rows)
            latents = reader.read(row, LATENTS_MEMBER)
            assert latents is not None, "build_index refuses samples without latents"
            condition = reader.read(row, CONDITION_MEMBER) or {}
            yield item, Encoded(latents=latents["latents"], condition=condition)


def texts_from_cache(
    work: Sequence[Work], committed: Captions, cache: CacheIndex, texts: TextCache
) -> None:
    """Put the embeddings of committed samples into `texts` that are to be written anew.

    Their caption is the same: something else about them has changed.
    """
    same = {
        key: caption
        for item in work
        for key, caption in missing_of(item, committed)
        if key in committed and committed[key].caption == caption_digest(caption)
    }
    if not same:
        return
    rows = {key: row for row, key in enumerate(cache.hex_keys()) if key in same}
    _check_copied(cache, rows.values())
    with closing(MemberReader(cache)) as reader:
        for key, row in rows.items():
            text = reader.read(row, TEXT_MEMBER)
            if text is not None and same[key] not in texts:
                texts.put(same[key], text["text"])


def _check_copied(cache: CacheIndex, rows: Iterable[int]) -> None:
    """Damage must not be copied under a fresh checksum."""
    check_shards(cache.store, {cache.shards[int(cache.shard_ids[row])] for row in rows})


def encode_decoded(
    clips: Sequence[tuple[Clip, tuple[Any, ...]]],
    encoder: Callable[[], "LatentEncoder"],
    encode: Callable[["LatentEncoder", Clip, Frames], Result],
    pool: WorkerPool,
    times: Times,
) -> Generator[tuple[Clip, Result | MediaError], None, None]:
    """Decode, fit and encode clips, as they are decoded; a clip that fails comes with the reason.

    Clips come with the arguments of `fitted_frames`. The VAE is built only if there are any; the
    next are decoded while it is busy. Adds to `times` what it waits and computes.
    """
    if not clips:
        return
    # One more than there are workers to have a clip ready, one more again for a worker that hangs.
    tasks = ((clip, clip[1]) for clip in clips)
    decoded = pool.completed(
        fitted_frames, tasks, source=lambda clip: clip[1][0], ahead=pool.workers + 2
    )
    busy = pool.busy
    with closing(decoded):
        latent_encoder = encoder()
        times.media_began = time.perf_counter()
        while True:
            began = time.perf_counter()
            with times.decoding:
                clip, frames = next(decoded, (None, None))
            if clip is None or frames is None:
                times.decoders += pool.busy - busy
                return
            try:
                with times.vae:
                    encoded = encode(latent_encoder, clip[0], frames.result())
                times.clips += 1
                times.clip_seconds += time.perf_counter() - began
                yield clip[0], encoded
            except MediaError as error:
                yield clip[0], error
            del frames  # a clip's memory, not held while the next is awaited


def latents_from_media(
    works: Sequence[Work],
    spec: ModelSpec,
    encoder: Callable[[], "LatentEncoder"],
    pool: WorkerPool,
    *,
    stored: torch.dtype,
    times: Times,
) -> Generator[tuple[Work, Encoded | MediaError], None, None]:
    """`encode_decoded` of clips, to latents and, where the mode has them, conditions."""

    def encode(encoder: "LatentEncoder", work: Work, frames: Frames) -> Encoded:
        latents = encoder.latents(frames)
        condition = encoder.condition(frames) if spec.given_frames else {}
        if not all_finite(latents, *condition.values()):
            raise MediaError("the VAE gave NaN or infinite values; try --vae-dtype fp32")
        times.pixels += work.pixels
        condition = {name: part.to(stored) for name, part in condition.items()}
        return Encoded(latents=latents.to(stored), condition=condition, frames=frames)

    return encode_decoded([(one, one.to_decode) for one in works], encoder, encode, pool, times)


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity in them."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
