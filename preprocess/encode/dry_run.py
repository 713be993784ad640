"""What `wanprep encode` would do, by the same steps up to the encoders: `wanprep plan`.

Nothing is written to the output folder. An encoder is built only to measure its speed.
"""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from preprocess.cache.text_cache import TextCache
from preprocess.dataset.left_out import LeftOut
from preprocess.encode import report
from preprocess.encode.config import EncodeConfig
from preprocess.encode.engine import LocalEngine
from preprocess.encode.fingerprint import settings_for_cache
from preprocess.encode.run import Job, plan_job, read_job
from preprocess.encode.speed import CAPTION, MEGAPIXEL, Times, foretold_seconds, remember_speed
from preprocess.encode.work import Captions, Work, committed_samples, missing_of, split
from preprocess.media.worker_pool import WorkerPool
from shared.cache.index import live_columns
from shared.cache.rejected import Rejected
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import committed_shards
from shared.format.fingerprint import Fingerprint, has_first_frame_rule
from shared.format.schema import DTYPES
from shared.format.tar import room
from shared.io.store import Store
from shared.models.spec import ModelSpec
from shared.models.wan import CLIP_TOKENS

_TENSOR_HEADER = 96  # bytes that safetensors puts before a tensor, about
_MEASURED = 3  # clips and captions that --measure encodes


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """Samples of one shape, by the names that --json prints."""

    width: int
    height: int
    frames: int
    samples: int
    in_shards: int
    new: int
    shortened: int
    upscaled: int
    bytes: int
    """About what the new ones take in shards."""


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a run would find and do, by the names that --json prints."""

    samples: int
    in_shards: int
    new: int
    leftover: int
    """Samples in the shards that the dataset does not give (any more)."""
    samples_an_epoch: int
    """Repeats counted."""
    bytes: int
    """About what the new ones take in shards, prompts included."""
    seconds: float | None
    """In the encoders; None if their speed is not known."""
    source_frames: int
    """Of all videos."""
    dropped_frames: int
    """Of these, how many lie before, between and after the clips."""
    buckets: tuple[BucketPlan, ...]
    rejected: tuple[Rejected, ...]
    left_out: tuple[LeftOut, ...]
    """By rule no part of the dataset."""
    changes: Mapping[str, Sequence[tuple[str, str]]]
    """Of the kinds in `report.CHANGES`: (source, in words), each once."""
    first_rule: bool
    """Whether there are shards of the first frame rule, of which `encode` may replace samples."""

    def to_json(self) -> dict[str, Any]:
        """For scripts: each kind of change under its own name."""
        fields = asdict(self)
        del fields["first_rule"], fields["changes"]
        return fields | {
            kind: [{"source": source, "change": change} for source, change in found]
            for kind, found in self.changes.items()
        }


def foresee(
    config: EncodeConfig, output: Store, console: Console, *, measure: bool = False
) -> Foreseen:
    """What `encode` would do with this configuration and its output.

    `measure`: encode a few clips and captions now, to know the speed. Raises UserError where
    `encode` would refuse to begin.
    """
    if output.folder.exists() and not output.folder.is_dir():
        raise UserError(f"--output: {output} is a file. Choose another folder.")
    with WorkerPool(config.workers, timeout=config.decode_timeout) as pool:
        job = read_job(config, output, console)
        spec = job.spec
        sidecars = committed_shards(output.folder) if output.folder.is_dir() else []
        fingerprint = settings_for_cache(
            config, output, job.fingerprint, spec.folder, job.hasher, sidecars
        )
        committed: Captions = {}
        bank: tuple[str, ...] = ()
        if sidecars:
            columns, bank = live_columns(output)
            committed = committed_samples(columns["key"], columns["caption"], columns["repeats"])
        plan = plan_job(job, pool, committed, bank, console)
        new = {work.home: missing_of(work, committed) for work in plan.works}
        _, _, unseen = split([work for work in plan.works if new[work.home]], committed)
        texts = [text for missing in new.values() for _, text in missing]
        captions = list(dict.fromkeys([*plan.prompt_texts, *texts]))
        if measure and unseen:
            _measure(job, fingerprint, pool, unseen, captions)

    tokens = dict(zip(captions, _token_counts(spec, captions), strict=True))
    sizes = _Sizes(config, spec, tokens)
    buckets = tuple(_buckets(plan.works, new, sizes))
    prompts = sum(map(sizes.text, plan.prompt_texts))
    megapixels = sum(work.pixels for work in unseen) / 1e6
    units = {MEGAPIXEL: megapixels, CAPTION: len(captions)}
    return Foreseen(
        samples=len(plan.live),
        in_shards=len(plan.live) - len(texts),
        new=len(texts),
        leftover=len(committed.keys() - plan.live),
        samples_an_epoch=sum(work.repeats * len(work.samples) for work in plan.works),
        bytes=sum(bucket.bytes for bucket in buckets) + prompts,
        seconds=foretold_seconds(config, fingerprint, units),
        **_frames(plan.works),
        buckets=buckets,
        rejected=(*job.dataset.rejected, *plan.rejected),
        left_out=job.dataset.left_out,
        changes=report.changes(plan.works),
        first_rule=any(has_first_frame_rule(sidecar.fingerprint) for sidecar in sidecars),
    )


def _measure(
    job: Job,
    fingerprint: Fingerprint,
    pool: WorkerPool,
    works: Sequence[Work],
    captions: Sequence[str],
) -> None:
    """Encode a few and remember how long it took."""
    times = Times()
    engine = LocalEngine(job.config, job.spec, pool, times)
    middle = sorted(works, key=lambda work: work.pixels)[len(works) // 2]
    with tempfile.TemporaryDirectory() as name:
        texts = TextCache(Path(name), fingerprint, 0)
        list(engine.encode_texts(captions[:_MEASURED], texts))
        results = engine.encode_media([middle] * _MEASURED, lambda work, encoded: None)
        for number, (_, error) in enumerate(results):
            if error is not None:
                raise UserError(f"--measure: {error}")
            if number == 0:  # was slower: buffers were allocated, kernels chosen
                times.pixels, times.clip_seconds = 0, 0.0
    remember_speed(job.config, fingerprint, times)


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


@dataclass(frozen=True)
class _Sizes:
    """Bytes in shards, tar headers included."""

    config: EncodeConfig
    spec: ModelSpec
    tokens: Mapping[str, int]
    """Of each caption."""

    def tensor(self, *shape: int) -> int:
        """A member with one tensor."""
        return room(DTYPES[self.config.dtype].itemsize * math.prod(shape) + _TENSOR_HEADER)

    def text(self, caption: str) -> int:
        return self.tensor(self.tokens[caption], self.spec.text_dim)

    def samples(self, work: Work, missing: Sequence[tuple[str, str]]) -> int:
        """What is missing of a clip."""
        spec, each = self.spec, 0
        if work.type != "text":
            latents = work.clip.bucket.latent_shape(spec.latent_channels, spec.stride)
            each = self.tensor(*latents) * (2 if spec.given_frames else 1)
            if spec.image_dim is not None:
                each += self.tensor(CLIP_TOKENS * len(spec.given_frames), spec.image_dim)
        return sum(
            each + room(len(work.info(caption).to_bytes())) + self.text(caption)
            for _, caption in missing
        )


def _buckets(
    planned: Sequence[Work], new: Mapping[str, Sequence[tuple[str, str]]], sizes: _Sizes
) -> Iterable[BucketPlan]:
    """`new`: what is missing of a clip, by its `home`."""
    by_bucket: dict[Bucket, list[Work]] = {}
    for work in planned:
        by_bucket.setdefault(work.clip.bucket, []).append(work)
    for bucket, works in sorted(by_bucket.items()):
        samples = sum(len(work.samples) for work in works)
        lacking = sum(len(new[work.home]) for work in works)
        yield BucketPlan(
            width=bucket.width,
            height=bucket.height,
            frames=bucket.frames,
            samples=samples,
            in_shards=samples - lacking,
            new=lacking,
            shortened=sum(len(work.samples) for work in works if report.is_short(work)),
            upscaled=sum(len(work.samples) for work in works if report.upscaling(work) > 1),
            bytes=sum(sizes.samples(work, new[work.home]) for work in works),
        )


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
