"""Image-to-video conditions for a text-to-video cache: every clip's first frame, encoded again.

What was cut out of a file stands in `KEY.json`, so the media are all that is needed beside the
cache: no size, stride or seed. The latents are neither read nor written.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from rich.console import Console

from preprocess.cache.index import settled_index
from preprocess.cache.ranks import Rank
from preprocess.cache.writer import ShardWriter
from preprocess.dataset.clips import Clip
from preprocess.dataset.entries import Rejected
from preprocess.dataset.recorded_clips import clip_of, same_content
from preprocess.dataset.rejected import rejected_file, write_rejected
from preprocess.encode.fingerprint import encoder_fields, refuse_absent
from preprocess.frames.media_info import MediaError
from preprocess.media.decode import digest, fitted_frames
from preprocess.media.sources import Medium, stamp
from preprocess.media.tars import base_folder, medium_named
from preprocess.media.worker_pool import WorkerPool
from preprocess.overlays.base import base_cache, overlay_to_write
from shared.cli.console import bar
from shared.cli.support import say
from shared.device import check_device
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import CacheIndex, MemberReader, committed_shards
from shared.format.fingerprint import (
    FORMAT_VERSION,
    LACKING,
    Fingerprint,
    as_in_cache,
    cache_mode,
    group_of,
    refuse_differences,
)
from shared.format.overlays import CONDITIONS
from shared.format.schema import (
    CONDITION_MEMBER,
    DTYPES,
    JSON_MEMBER,
    MEDIA_TYPES,
    pack,
)
from shared.interrupt import Interrupted, Interruption, catch_signals
from shared.io.hashing import FileHasher
from shared.models.spec import ModelSpec, read_model_spec, resolve_model

if TYPE_CHECKING:
    from preprocess.encode.encoders import LatentEncoder

SHARD_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """One `wanprep add-condition`."""

    shards: Path
    model: str
    """An i2v model with the VAE that encoded the cache."""
    data_dir: Path
    """What the names in the cache are relative to."""
    device: str
    workers: int
    decode_timeout: float
    rank: Rank = field(default_factory=Rank)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--num-workers: {self.workers} is too small; expected at least 1.")
        if not self.decode_timeout > 0:
            raise UserError(
                f"--decode-timeout: {self.decode_timeout:g} is no time; expected seconds above 0."
            )


@dataclass
class Added:
    """How a run ended."""

    folder: Path
    index: CacheIndex | None = None
    """Of the overlay; None where nothing is committed yet."""
    written: int = 0
    """Samples that this run gave a condition."""
    left: int = 0
    """Samples of the cache that have none yet."""
    rejected: list[Rejected] = field(default_factory=list)
    signum: int | None = None
    """The signal that ended the run early."""


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A clip of the cache, with its samples: one for each caption."""

    rows: tuple[int, ...]
    path: Medium
    source: str
    type: Literal["video", "image"]
    clip: Clip


def add_condition(config: ConditionConfig, console: Console) -> Added:
    """Give every sample of a text-to-video cache that has none the condition of its first frame.

    Raises UserError for what the user can mend; files that are missing, changed or damaged are in
    the outcome.
    """
    outcome = Added(folder=config.shards / CONDITIONS)
    with catch_signals("stopping: committing what is encoded ...") as signals:
        try:
            with (
                WorkerPool(config.workers, timeout=config.decode_timeout) as pool,
                base_cache(config.shards) as base,
            ):
                _add(config, console, base, pool, signals, outcome)
        except Interrupted as interrupted:
            outcome.signum = interrupted.signum
    return outcome


def _add(
    config: ConditionConfig,
    console: Console,
    base: CacheIndex,
    pool: WorkerPool,
    signals: Interruption,
    outcome: Added,
) -> None:
    own = group_of(base.fingerprint, "latents", base.folder)
    spec = _i2v_model(config)
    mode = base.fingerprint.get("mode")
    if mode not in LACKING[cache_mode(spec)]:
        raise UserError(
            f"shards: {config.shards} was encoded for {mode}; only a "
            f"{' or '.join(LACKING[cache_mode(spec)])} cache can get the conditions of "
            f"{spec.folder}. There is nothing to add."
        )
    if len(base) and bool((base.types == MEDIA_TYPES.index("text")).all()):
        raise UserError(
            f"shards: the samples in {config.shards} are captions without media; there is no first "
            "frame to encode."
        )
    check_device(config.device)
    say(console, f"model    {spec.folder} ({spec.mode}) on {config.device}")
    hasher = FileHasher()
    fingerprint = _fingerprint(config, base, spec, hasher, console)
    cure = f"Delete {outcome.folder} and run this command again; the cache itself stays as it is."
    with overlay_to_write(
        outcome.folder, fingerprint, writer=config.rank.number, world=config.rank.world, cure=cure
    ) as there:
        outcome.index = there
        media = np.flatnonzero(base.types != MEDIA_TYPES.index("text"))  # a caption has no frame
        mine = [int(row) for row in media if config.rank.owns(base.key(int(row)))]
        todo = _clips(base, _missing(base, mine, there), config.data_dir)
        outcome.left = sum(len(clip.rows) for clip in todo)
        say(
            console,
            f"samples  {len(mine)}: {len(mine) - outcome.left} have a condition, {outcome.left} "
            "to encode",
        )
        stored = DTYPES[own["dtype"]]
        writer = ShardWriter(
            outcome.folder, fingerprint, shard_bytes=SHARD_BYTES, writer=config.rank.number
        )

        def encoder() -> "LatentEncoder":
            from preprocess.encode.encoders import LatentEncoder

            dtype = DTYPES[own["compute"]]
            return LatentEncoder(spec, dtype=dtype, device=config.device)

        reader = MemberReader(base)
        try:
            with bar(console, "looking into the media", len(todo)) as advance:
                same = []
                for clip, problem in _checked(base, todo, hasher, pool):
                    advance()
                    if problem is None:
                        same.append(clip)
                    else:
                        outcome.rejected.append(Rejected(source=clip.source, reason=problem))
            with bar(console, "encoding first frames", len(same)) as advance:
                for clip, result in _conditions(same, encoder, pool):
                    if isinstance(result, MediaError):
                        rejected = Rejected(source=clip.source, reason=str(result))
                        outcome.rejected.append(rejected)
                    else:
                        packed = pack(**{name: part.to(stored) for name, part in result.items()})
                        for row in clip.rows:
                            members = {
                                JSON_MEMBER: reader.raw(row, JSON_MEMBER),
                                CONDITION_MEMBER: packed,
                            }
                            with signals.deferred():
                                writer.add_members(base.key(row), clip.clip.bucket, members)
                                outcome.written += 1
                    advance()
            with signals.deferred():
                writer.close()
                _finish(config, base, mine, outcome)
        except BaseException:  # a signal, a full disk: what is encoded is kept
            with signals.deferred(raise_after=False):
                writer.rescue()
                with suppress(OSError):
                    _finish(config, base, mine, outcome)
            raise
        finally:
            reader.close()


def _i2v_model(config: ConditionConfig) -> ModelSpec:
    spec = read_model_spec(resolve_model(config.model, ("vae", "image_encoder", "image_processor")))
    if spec.mode != "i2v":
        raise UserError(
            f"model: {spec.folder} is a {spec.mode} model; conditions are made for i2v models. Set "
            "--pretrained-model-name-or-path to one."
        )
    return spec


def _fingerprint(
    config: ConditionConfig,
    base: CacheIndex,
    spec: ModelSpec,
    hasher: FileHasher,
    console: Console,
) -> Fingerprint:
    """Refuses a VAE that is not the cache's."""
    with console.status("digesting the encoders' weights (read once, then remembered)"):
        fields = encoder_fields(spec, hasher)
        fields = as_in_cache(fields, base.fingerprint, spec.folder, hasher)
    made_by: Fingerprint = {
        group: fields[group] for group in ("latents", "image") if group in fields
    }
    refuse_absent(spec, made_by)
    vae = made_by["latents"]
    refuse_differences(
        {"latents": base.fingerprint["latents"]},
        {"latents": vae},
        what=f"shards: {config.shards} was encoded by another VAE than {spec.folder} has",
        cure="Encode for this model into a folder of its own: wanprep encode --output DIR",
    )
    own = base.fingerprint["latents"]
    return {
        "format": FORMAT_VERSION,
        "overlay": CONDITIONS,
        "mode": cache_mode(spec),
        **made_by,
        "latents": {**vae, "dtype": own["dtype"], "compute": own["compute"]},
    }


def _missing(base: CacheIndex, rows: Sequence[int], there: CacheIndex | None) -> list[int]:
    have = set() if there is None else set(there.hex_keys())
    return [row for row in rows if base.key(row) not in have]


def _clips(base: CacheIndex, rows: Sequence[int], data_dir: Path) -> list[_Clip]:
    """The clips of these samples, each once, however many captions it has."""
    found: dict[tuple[str, Clip], list[int]] = {}
    types: dict[tuple[str, Clip], Literal["video", "image"]] = {}
    reader = MemberReader(base)
    try:
        for row in rows:
            info = reader.info(row)
            clip = clip_of(base, row, info)
            name = (str(info["source"]), clip)
            found.setdefault(name, []).append(row)
            types[name] = info["type"]
    finally:
        reader.close()
    return [
        _Clip(
            rows=tuple(rows),
            path=medium_named(base_folder(data_dir), source),
            source=source,
            type=types[source, clip],
            clip=clip,
        )
        for (source, clip), rows in found.items()
    ]


def _checked(
    base: CacheIndex, clips: Sequence[_Clip], hasher: FileHasher, pool: WorkerPool
) -> Iterator[tuple[_Clip, str | None]]:
    """Clips with None, or with why the file of that name is not the one that was encoded."""

    def known(clip: _Clip) -> str | None:
        found = stamp(clip.path, hasher)
        return None if found is None else hasher.known(found)

    looked = pool.completed(
        digest,
        ((clip, (clip.path, known(clip))) for clip in clips),
        source=lambda clip: clip.path,
        ahead=4 * pool.workers,
    )
    for clip, future in looked:
        try:
            sha256 = future.result()
        except (MediaError, OSError) as error:
            yield clip, str(error)
            continue
        if (remembered := stamp(clip.path, hasher)) is not None:
            hasher.remember(remembered, sha256)
        if same_content({base.key(row) for row in clip.rows}, clip.clip, sha256):
            yield clip, None
        else:
            yield clip, f"{clip.path}: its content is not what was encoded; `wanprep encode` again"


def _conditions(
    clips: Sequence[_Clip], encoder: Callable[[], "LatentEncoder"], pool: WorkerPool
) -> Iterator[tuple[_Clip, dict[str, torch.Tensor] | MediaError]]:
    """Clips with their condition (`cond`, of Wan 2.1 `clip`), fp32, or why there is none."""
    if not clips:
        return

    def first_frame(clip: _Clip) -> tuple[Medium, str, list[int], Bucket]:
        bucket = Bucket(clip.clip.bucket.height, clip.clip.bucket.width, 1)
        return clip.path, clip.type, [clip.clip.frame_indices[0]], bucket

    decoded = pool.completed(
        fitted_frames,
        ((clip, first_frame(clip)) for clip in clips),
        source=lambda clip: clip.path,
        ahead=pool.workers + 2,
    )
    with closing(decoded):
        latent_encoder = encoder()
        for clip, future in decoded:
            try:
                first = future.result()
                # All that the condition sees: the first frame, and how many there are.
                frames = np.zeros((clip.clip.bucket.frames, *first.shape[1:]), np.uint8)
                frames[:1] = first
                condition = latent_encoder.condition(frames)
                if not all(bool(torch.isfinite(part).all()) for part in condition.values()):
                    raise MediaError("the VAE gave NaN or infinite values")
                yield clip, condition
            except MediaError as error:
                yield clip, error


def _finish(config: ConditionConfig, base: CacheIndex, mine: Sequence[int], outcome: Added) -> None:
    write_rejected(rejected_file(outcome.folder, config.rank.number), outcome.rejected)
    if committed_shards(outcome.folder):
        outcome.index = settled_index(outcome.folder)
    outcome.left = len(_missing(base, mine, outcome.index))
