"""Conditions for a cache without, or with others: every clip's given frames, encoded again.

What was cut out of a file stands in `KEY.json`, so the media are all that is needed beside the
cache: no size, stride or seed. The latents are neither read nor written.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from preprocess.dataset.clips import Clip
from preprocess.dataset.recorded_clips import clip_of, same_content
from preprocess.encode.config import device_here
from preprocess.encode.engine import latent_encoder
from preprocess.encode.fingerprint import fields_in_cache, refuse_absent, refuse_other_vae
from preprocess.encode.passes import Frames, all_finite, encode_decoded
from preprocess.encode.speed import Times
from preprocess.frames.media_info import MediaError, MediaKind
from preprocess.media.decode import digest
from preprocess.media.remote import DataDir, open_folder
from preprocess.media.sources import MediaFile, stamp
from preprocess.media.tars import base_folder, media_named
from preprocess.media.worker_pool import WorkerPool, default_workers
from preprocess.overlays.base import SHARD_BYTES, base_cache, overlay_session
from preprocess.overlays.config import ConditionConfig
from shared.cache.session import Outcome, stoppable
from shared.cli.console import bar
from shared.cli.support import say
from shared.device import take_device
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader
from shared.format.fingerprint import FORMAT_VERSION, LACKING, Fingerprint, cache_mode, group_of
from shared.format.overlays import CONDITIONS
from shared.format.schema import CONDITION_MEMBER, DTYPES, JSON_MEMBER, MEDIA_TYPES, pack
from shared.io.hashing import FileHasher
from shared.io.store import Store
from shared.models.spec import ModelSpec, in_train_mode, read_model_spec, resolve_model

if TYPE_CHECKING:
    from preprocess.encode.encoders import LatentEncoder


@dataclass(kw_only=True)
class Added(Outcome):
    """How a run ended. `left` counts samples of the cache that have no condition yet."""

    store: Store


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A clip of the cache, with its samples: one for each caption."""

    rows: tuple[int, ...]
    path: MediaFile
    source: str
    type: MediaKind
    clip: Clip


def add_condition(config: ConditionConfig, store: Store, console: Console) -> Added:
    """Give every sample that has none the condition of its first frame, or its first and last.

    Raises UserError for what the user can mend; files that are missing, changed or damaged are in
    the outcome.
    """
    config = replace(config, device=device_here(config.device, config.rank))
    workers = config.num_workers or default_workers(config.rank.local_world)
    outcome = Added(store=store.below(CONDITIONS))
    with (
        stoppable(outcome) as signals,
        WorkerPool(workers, timeout=config.decode_timeout) as pool,
        base_cache(store) as base,
    ):
        # What there is: a cache that lacks what the model wants.
        own = group_of(base.fingerprint, "latents", base.store)
        spec = _conditioned_model(config)
        _refuse_without_first_frames(config, base, spec)
        take_device(config.device)
        say(console, f"model    {spec.folder} ({spec.mode}) on {config.device}")
        fingerprint = _fingerprint(config, base, spec, console)
        cure = (
            f"Delete {outcome.store} and run this command again; the cache itself stays as it is."
        )
        with overlay_session(
            outcome.store, config.rank, signals, outcome, fingerprint, cure=cure
        ) as session:
            # What the overlay lacks of it. (A caption has no frame.)
            media = np.flatnonzero(base.types != MEDIA_TYPES.index("text"))
            mine = [int(row) for row in media if config.rank.owns(base.key(int(row)))]
            todo = _clips(
                base,
                session.lacking(partial(_missing, base, mine)),
                open_folder(config.train_data_dir),
            )
            done = len(mine) - outcome.left
            say(console, f"samples  {len(mine)}: {done} have a condition, {outcome.left} to encode")

            writer = session.writer(SHARD_BYTES)
            with session.rescued(writer.rescue), closing(MemberReader(base)) as reader:
                # Media that are what was encoded.
                same = []
                with bar(console, "checking media", len(todo)) as advance:
                    for clip, problem in _checked(base, todo, pool):
                        if problem is None:
                            same.append(clip)
                        else:
                            outcome.reject(clip.source, problem)
                        advance()

                # VAE pass.
                encoder = partial(latent_encoder, spec, own["compute"], config.device)
                with bar(console, "encoding given frames", len(same)) as advance:
                    for clip, result in _conditions(
                        same, encoder, pool, DTYPES[own["dtype"]], spec.given_frames
                    ):
                        advance()
                        if isinstance(result, MediaError):
                            outcome.reject(clip.source, result)
                            continue
                        for row in clip.rows:
                            info = reader.raw(row, JSON_MEMBER)
                            members = {JSON_MEMBER: info, CONDITION_MEMBER: result}
                            with signals.deferred():
                                writer.add_members(base.key(row), clip.clip.bucket, members)
                                outcome.written += 1
                with signals.deferred():
                    writer.close()
                    session.settle()
    return outcome


def _refuse_without_first_frames(
    config: ConditionConfig, base: CacheIndex, spec: ModelSpec
) -> None:
    """UserError where a cache is for another kind of model, or has no first frames at all."""
    mode = base.fingerprint.get("mode")
    if mode not in LACKING[cache_mode(spec)]:
        raise UserError(
            f"shards: {base.store} was encoded for {mode}; only a "
            f"{' or '.join(LACKING[cache_mode(spec)])} cache can get the conditions of "
            f"{spec.folder}. There is nothing to add."
        )
    if len(base) and bool((base.types == MEDIA_TYPES.index("text")).all()):
        raise UserError(
            f"shards: the samples in {base.store} are text-only; there is no first frame to encode."
        )


def _conditioned_model(config: ConditionConfig) -> ModelSpec:
    spec = read_model_spec(resolve_model(config.model, ("vae", "image_encoder", "image_processor")))
    spec = in_train_mode(spec, config.train_mode)
    if not spec.given_frames:
        raise UserError(
            f"model: {spec.folder} is a {spec.mode} model; conditions are made for i2v models. Set "
            "--pretrained-model-name-or-path to one."
        )
    return spec


def _fingerprint(
    config: ConditionConfig, base: CacheIndex, spec: ModelSpec, console: Console
) -> Fingerprint:
    """Refuses a VAE that is not the cache's."""
    fields = fields_in_cache(spec, base, console)
    made_by: Fingerprint = {
        group: fields[group] for group in ("latents", "image") if group in fields
    }
    refuse_absent(spec, made_by)
    cure = "Encode for this model into a folder of its own: wanprep encode --output DIR"
    refuse_other_vae(base, spec, fields, cure=cure)
    own = base.fingerprint["latents"]
    return {
        "format": FORMAT_VERSION,
        "overlay": CONDITIONS,
        "mode": cache_mode(spec),
        **made_by,
        "latents": {**fields["latents"], "dtype": own["dtype"], "compute": own["compute"]},
    }


def _missing(base: CacheIndex, rows: Sequence[int], there: CacheIndex | None) -> list[int]:
    """Those that the overlay lacks."""
    have = set() if there is None else set(there.hex_keys())
    return [row for row in rows if base.key(row) not in have]


def _clips(base: CacheIndex, rows: Sequence[int], data_dir: DataDir) -> list[_Clip]:
    """The clips of these samples, each once, however many captions it has."""
    found: dict[tuple[str, MediaKind, Clip], list[int]] = {}
    with closing(MemberReader(base)) as reader:
        for row in rows:
            info = reader.info(row)
            clip = clip_of(base, row, info)
            found.setdefault((str(info["source"]), info["type"], clip), []).append(row)
    return [
        _Clip(
            rows=tuple(rows),
            path=media_named(base_folder(data_dir), source),
            source=source,
            type=kind,
            clip=clip,
        )
        for (source, kind, clip), rows in found.items()
    ]


def _checked(
    base: CacheIndex, clips: Sequence[_Clip], pool: WorkerPool
) -> Iterator[tuple[_Clip, str | None]]:
    """Clips with None, or with why the file of that name is not the one that was encoded."""
    hasher, tasks = FileHasher(), []
    for clip in clips:
        name = stamp(clip.path, hasher)
        tasks.append(((clip, name), (clip.path, None if name is None else hasher.known(name))))
    results = pool.completed(
        digest, tasks, source=lambda task: task[0].path, ahead=4 * pool.workers
    )
    for (clip, name), future in results:
        try:
            sha256 = future.result()
        except (MediaError, OSError) as error:
            yield clip, str(error)
            continue
        if name is not None:
            hasher.remember(name, sha256)
        if same_content({base.key(row) for row in clip.rows}, clip.clip, sha256):
            yield clip, None
        else:
            yield clip, f"{clip.path}: its content is not what was encoded; `wanprep encode` again"


def _conditions(
    clips: Sequence[_Clip],
    encoder: Callable[[], "LatentEncoder"],
    pool: WorkerPool,
    stored: torch.dtype,
    given: Sequence[int],
) -> Iterator[tuple[_Clip, bytes | MediaError]]:
    """Clips with the condition of their `given` frames, packed, or why there is none."""

    def places(clip: _Clip) -> list[int]:
        return sorted({place % clip.clip.bucket.frames for place in given})

    def encode(encoder: "LatentEncoder", clip: _Clip, shown: Frames) -> bytes:
        # All that the condition sees: the given frames, and how many there are.
        frames = np.zeros((clip.clip.bucket.frames, *shown.shape[1:]), np.uint8)
        frames[places(clip)] = shown
        condition = encoder.condition(frames)
        if not all_finite(*condition.values()):
            raise MediaError("the VAE gave NaN or infinite values")
        return pack(**{name: part.to(stored) for name, part in condition.items()})

    def to_decode(clip: _Clip) -> tuple[Any, ...]:
        indices = [clip.clip.frame_indices[place] for place in places(clip)]
        return clip.path, clip.type, indices, replace(clip.clip.bucket, frames=len(indices))

    return encode_decoded([(one, to_decode(one)) for one in clips], encoder, encode, pool, Times())
