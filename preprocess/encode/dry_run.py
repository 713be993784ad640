"""What `wanprep encode` would do, by the same steps up to the encoders: `wanprep plan`.

Nothing is written to the output folder. An encoder is built only to measure its speed.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from preprocess.cache.index import live_columns
from preprocess.cache.text_cache import TextCache
from preprocess.dataset.entries import Rejected
from preprocess.encode import report
from preprocess.encode.config import EncodeConfig
from preprocess.encode.engine import LocalEngine
from preprocess.encode.fingerprint import settings_for_cache
from preprocess.encode.passes import Times
from preprocess.encode.run import look_into_media, missing_prompts, read_job
from preprocess.encode.speed import Speed, known_speed, remember_speed
from preprocess.encode.validation_prompts import missing_validation
from preprocess.encode.work import Captions, Work, committed_samples, missing_of
from preprocess.frames.media_info import MediaError
from preprocess.media.worker_pool import WorkerPool
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import committed_shards
from shared.format.fingerprint import Fingerprint, has_first_frame_rule
from shared.format.prompts import prompts_by_shard
from shared.format.schema import DTYPES
from shared.format.tar import room
from shared.models.spec import ModelSpec

_TENSOR_HEADER = 96  # bytes that safetensors puts before a tensor, about
_CLIP_TOKENS = 257
_MEASURED = 3  # clips and captions that --measure encodes


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """Samples of one shape."""

    bucket: Bucket
    samples: int
    new: int
    shortened: int
    upscaled: int
    new_bytes: int
    """About what the new ones take in shards."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that becomes of a medium, for the reader to see."""

    source: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a run would find and do."""

    buckets: tuple[BucketPlan, ...]
    samples: int
    new: int
    leftover: int
    """Samples in the shards that the dataset does not give (any more)."""
    first_rule: bool
    """Whether shards of the first frame rule are there, of which `encode` may replace samples."""
    epoch: int
    """Samples that an epoch shows, repeats counted."""
    rejected: tuple[Rejected, ...]
    shortened: tuple[Change, ...]
    upscaled: tuple[Change, ...]
    slow: tuple[Change, ...]
    """Videos slower than the frame rate asked for, if only in places."""
    noted: tuple[Change, ...]
    """What is odd of videos that are taken all the same."""
    source_frames: int
    """Of all videos."""
    dropped_frames: int
    """Of these, how many lie before, between and after the clips."""
    new_bytes: int
    seconds: float | None
    """In the encoders; None where their speed is not known."""

    @property
    def there(self) -> int:
        """Samples that are in the shards already."""
        return self.samples - self.new

    def to_json(self) -> dict[str, Any]:
        """For scripts: names as here, buckets with their sides."""

        def changes(found: Sequence[Change]) -> list[dict[str, str]]:
            return [{"source": change.source, "change": change.said} for change in found]

        return {
            "samples": self.samples,
            "in_shards": self.there,
            "new": self.new,
            "leftover": self.leftover,
            "samples_an_epoch": self.epoch,
            "bytes": self.new_bytes,
            "seconds": self.seconds,
            "source_frames": self.source_frames,
            "dropped_frames": self.dropped_frames,
            "buckets": [
                {
                    "width": plan.bucket.width,
                    "height": plan.bucket.height,
                    "frames": plan.bucket.frames,
                    "samples": plan.samples,
                    "in_shards": plan.samples - plan.new,
                    "new": plan.new,
                    "shortened": plan.shortened,
                    "upscaled": plan.upscaled,
                    "bytes": plan.new_bytes,
                }
                for plan in self.buckets
            ],
            "rejected": [{"source": one.source, "reason": one.reason} for one in self.rejected],
            "shortened": changes(self.shortened),
            "upscaled": changes(self.upscaled),
            "slow": changes(self.slow),
            "noted": changes(self.noted),
        }


def foresee(config: EncodeConfig, console: Console, *, measure: bool = False) -> Foreseen:
    """What `encode` would do with this configuration.

    `measure`: encode a few clips and captions now, to know the speed. Raises UserError where
    `encode` would refuse to begin.
    """
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output: {config.output} is a file. Choose another folder.")
    with WorkerPool(config.workers, timeout=config.decode_timeout) as pool:
        job = read_job(config, console)
        spec, fingerprint = job.spec, job.fingerprint
        sidecars = committed_shards(config.output) if config.output.is_dir() else []
        fingerprint = settings_for_cache(config, fingerprint, sidecars, spec.folder, job.hasher)
        committed: Captions = {}
        bank: tuple[str, ...] = ()
        if sidecars:
            columns, bank = live_columns(config.output)
            committed = committed_samples(columns["key"], columns["caption"], columns["repeats"])
        planned, rejected = look_into_media(config, job, pool, committed, console)
        new = [(work, missing) for work in planned if (missing := missing_of(work, committed))]
        unseen = [
            work
            for work, _ in new
            if work.type != "text" and not any(key in committed for key, _ in work.samples)
        ]
        there = prompts_by_shard(config.output, bank)
        validation = missing_validation(job.validation, there)
        to_sample = [] if validation is None else [one.prompt for one in validation.wanted]
        prompts = [text for _, text in missing_prompts(config, there)] + to_sample
        captions = list(dict.fromkeys([*prompts, *(text for _, m in new for _, text in m)]))
        if measure and unseen:
            _measure(config, spec, fingerprint, pool, unseen, captions)

    tokens = dict(zip(captions, _token_counts(spec, captions), strict=True))
    live = {key for work in planned for key, _ in work.samples}
    gone = {work.home: missing for work, missing in new}
    return Foreseen(
        buckets=tuple(_buckets(config, spec, planned, gone, tokens)),
        samples=len(live),
        new=sum(len(missing) for _, missing in new),
        leftover=len(committed.keys() - live),
        first_rule=any(has_first_frame_rule(sidecar.fingerprint) for sidecar in sidecars),
        epoch=sum(work.repeats * len(work.samples) for work in planned),
        rejected=(*job.dataset.rejected, *rejected),
        shortened=_once(_shortened(planned)),
        upscaled=_once(_upscaled(planned)),
        slow=_once(_slow(planned)),
        noted=_once(_noted(planned)),
        **_frames(planned),
        new_bytes=sum(_bytes(config, spec, work, missing, tokens) for work, missing in new)
        + sum(_tensor(config, tokens[text], spec.text_dim) for text in prompts),
        seconds=_seconds(known_speed(config, fingerprint), unseen, captions),
    )


def _measure(
    config: EncodeConfig,
    spec: ModelSpec,
    fingerprint: Fingerprint,
    pool: WorkerPool,
    works: Sequence[Work],
    captions: Sequence[str],
) -> None:
    """Encode a few and remember how long it took."""
    times = Times()
    engine = LocalEngine(config, spec, pool, times)
    middle = sorted(works, key=_pixels)[len(works) // 2]
    with tempfile.TemporaryDirectory() as name:
        texts = TextCache(Path(name), fingerprint, 0)
        engine.encode_texts(captions[:_MEASURED], texts, on_progress=lambda: None)
        results = engine.encode_media([middle] * _MEASURED, texts)
        for number, (_, result) in enumerate(results):
            if isinstance(result, MediaError):
                raise UserError(f"--measure: {result}")
            if number == 0:  # was slower: buffers were allocated, kernels chosen
                times.pixels, times.media_seconds = 0, 0.0
    remember_speed(config, fingerprint, times)


def _pixels(work: Work) -> int:
    bucket = work.clip.bucket
    return bucket.height * bucket.width * bucket.frames


def _seconds(speed: Speed, works: Sequence[Work], captions: Sequence[str]) -> float | None:
    megapixels = sum(map(_pixels, works)) / 1e6
    parts = ((speed.megapixel, megapixels), (speed.caption, len(captions)))
    if any(one is None and units for one, units in parts):
        return None
    return sum((one or 0.0) * units for one, units in parts)


def _token_counts(spec: ModelSpec, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption; about, where the tokenizer has no fast form."""
    file = spec.folder / "tokenizer" / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        counts = [len(found.ids) for found in tokenizer.encode_batch(list(captions))]
    else:
        counts = [len(caption.encode()) // 4 + 1 for caption in captions]
    return [min(spec.family.text_tokens, number) for number in counts]


def _tensor(config: EncodeConfig, *shape: int) -> int:
    """Bytes of a member with one tensor, its tar header included."""
    values = DTYPES[config.dtype].itemsize
    for side in shape:
        values *= side
    return room(values + _TENSOR_HEADER)


def _bytes(
    config: EncodeConfig,
    spec: ModelSpec,
    work: Work,
    missing: Sequence[tuple[str, str]],
    tokens: dict[str, int],
) -> int:
    """Bytes in the shards of what is missing of a clip."""
    latents = _tensor(config, *work.clip.bucket.latent_shape(spec.latent_channels, spec.stride))
    each = latents * (2 if spec.mode == "i2v" else 1)
    if spec.image_dim is not None:
        each += _tensor(config, _CLIP_TOKENS, spec.image_dim)
    if work.type == "text":  # a caption alone
        each = 0
    total = 0
    for _, caption in missing:
        info = room(len(work.info(caption).to_bytes()))
        total += each + info + _tensor(config, tokens[caption], spec.text_dim)
    return total


def _buckets(
    config: EncodeConfig,
    spec: ModelSpec,
    planned: Sequence[Work],
    missing: dict[str, list[tuple[str, str]]],
    tokens: dict[str, int],
) -> Iterable[BucketPlan]:
    by_bucket: dict[Bucket, list[Work]] = {}
    for work in planned:
        by_bucket.setdefault(work.clip.bucket, []).append(work)
    for bucket, works in sorted(by_bucket.items()):
        gone = [(work, missing.get(work.home, [])) for work in works]
        yield BucketPlan(
            bucket=bucket,
            samples=sum(len(work.samples) for work in works),
            new=sum(len(which) for _, which in gone),
            shortened=sum(len(w.samples) for w in works if _is_short(w)),
            upscaled=sum(len(w.samples) for w in works if _upscaling(w) > 1),
            new_bytes=sum(_bytes(config, spec, work, which, tokens) for work, which in gone),
        )


def _once(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Variants and captions of one medium are often changed alike."""
    return tuple(dict.fromkeys(changes))


def _is_short(work: Work) -> bool:
    return work.type == "video" and work.clip.bucket.frames < work.clip.asked


def _upscaling(work: Work) -> float:
    """How much larger than the source a sample is shown; 1 or less: no pixel is made up."""
    bucket, probe = work.clip.bucket, work.probe
    if probe is None:
        return 0
    return max(bucket.height / probe.height, bucket.width / probe.width)


def _shortened(planned: Sequence[Work]) -> Iterable[Change]:
    for work in filter(_is_short, planned):
        if work.probe is not None:
            said = f"{work.clip.asked} frames asked, {work.clip.bucket.frames} taken of"
            yield Change(source=work.entry.source, said=f"{said} {work.probe.frames}")


def _upscaled(planned: Sequence[Work]) -> Iterable[Change]:
    for work in planned:
        probe, bucket = work.probe, work.clip.bucket
        if probe is not None and (factor := _upscaling(work)) > 1:
            sizes = f"{probe.width}x{probe.height} to {bucket.width}x{bucket.height}"
            yield Change(source=work.entry.source, said=f"{sizes}, {factor:.2f} times as large")


def _slow(planned: Sequence[Work]) -> Iterable[Change]:
    for work in planned:
        if work.probe is not None and (number := report.repeats(work)):
            said = f"{number} of {work.clip.bucket.frames} frames are repeated"
            yield Change(source=work.entry.source, said=f"{said} ({work.probe.fps:g} a second)")


def _noted(planned: Sequence[Work]) -> Iterable[Change]:
    for work in planned:
        for note in () if work.probe is None else work.probe.notes:
            yield Change(source=work.entry.source, said=note)


def _frames(planned: Sequence[Work]) -> dict[str, int]:
    """Frames of all videos, and those outside of every clip."""
    spans: dict[str, list[tuple[int, int]]] = {}
    length: dict[str, int] = {}
    for work in planned:
        if work.probe is not None and work.type == "video":
            indices = work.clip.frame_indices
            spans.setdefault(work.entry.source, []).append((indices[0], indices[-1] + 1))
            length[work.entry.source] = work.probe.frames
    inside = 0
    for windows in spans.values():
        reached = 0
        for start, end in sorted(windows):
            inside += max(0, end - max(start, reached))
            reached = max(reached, end)
    return {
        "source_frames": sum(length.values()),
        "dropped_frames": sum(length.values()) - inside,
    }
