"""The loop of stage one: media and captions → shards.

    dataset → plan (probe, clip, key) → what is missing → text pass → VAE pass → index

The text encoder and the VAE are never in memory together. Everything that is committed stays,
however the run ends, and the same command goes on from there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch
from rich.console import Console

from preprocess.cache.background_writer import BackgroundWriter
from preprocess.cache.index import settled_index
from preprocess.cache.remove import unlisted
from preprocess.cache.text_cache import TextCache
from preprocess.cache.writer import (
    ShardWriter,
    refusals_explained,
    remove_abandoned,
    writer_lock,
)
from preprocess.dataset.clips import ClipRule
from preprocess.dataset.entries import Dataset, Rejected, load_dataset
from preprocess.dataset.rejected import rejected_file, rejections, write_rejected
from preprocess.dataset.toml_config import load_dataset_config
from preprocess.encode import report
from preprocess.encode.config import EncodeConfig, in_train_mode
from preprocess.encode.engine import COMPONENTS, Elsewhere, Engine, LocalEngine
from preprocess.encode.fingerprint import encode_fingerprint, settings_for_cache
from preprocess.encode.old_samples import superseded
from preprocess.encode.passes import (
    Encoded,
    Times,
    latents_from_cache,
    samples_of,
    texts_from_cache,
)
from preprocess.encode.speed import remember_speed
from preprocess.encode.validation_prompts import (
    ValidationPrompt,
    missing_validation,
    read_pictures,
    read_validation_prompts,
)
from preprocess.encode.work import Captions, Work, committed_of, missing_of, plan_work
from preprocess.frames.media_info import MediaError
from preprocess.media.worker_pool import WorkerPool
from shared.cli.console import bar, count
from shared.cli.support import say
from shared.device import check_device
from shared.errors import UserError
from shared.format.cache import CacheIndex, committed_shards
from shared.format.fingerprint import Fingerprint
from shared.format.prompts import EMPTY, NEGATIVE, Prompt, prompts_by_shard
from shared.interrupt import Interrupted, Interruption, catch_signals
from shared.io.hashing import FileHasher
from shared.models.spec import ModelSpec, read_model_spec, resolve_model


@dataclass
class Outcome:
    """How a run ended."""

    index: CacheIndex | None = None
    """None where nothing is committed yet."""
    written: int = 0
    """Samples that this run encoded."""
    validation: int = 0
    """Validation prompts, where this run wrote their list."""
    removed: int = 0
    """Samples that are not in the dataset any more and were removed from the cache (--prune)."""
    replaced: int = 0
    """Samples that an older frame rule had misread and that were taken out for new ones."""
    left: int = 0
    """Samples of the dataset that are not in the shards."""
    rejected: list[Rejected] = field(default_factory=list)
    signum: int | None = None
    """The signal that ended the run early."""
    times: Times = field(default_factory=Times)


def encode(config: EncodeConfig, console: Console, elsewhere: Elsewhere | None = None) -> Outcome:
    """Bring the cache in `config.output` up to date with the dataset.

    The encoders run in this process, or `elsewhere`.
    Raises UserError for what the user can mend; rejected samples and signals are in the outcome.
    """
    assert (elsewhere is not None) == (config.engine == "ray")
    outcome = Outcome()
    if elsewhere is not None:
        config = replace(config, device=elsewhere.device)
    with catch_signals("stopping: committing what is encoded ...") as signals:
        try:
            # First of all: the workers get up while weights are digested.
            with WorkerPool(config.workers, timeout=config.decode_timeout) as pool:
                _encode(config, console, pool, elsewhere, signals, outcome)
        except Interrupted as interrupted:
            outcome.signum = interrupted.signum
    return outcome


def _encode(
    config: EncodeConfig,
    console: Console,
    pool: WorkerPool,
    elsewhere: Elsewhere | None,
    signals: Interruption,
    outcome: Outcome,
) -> None:
    # What there is: the dataset and the model.
    job = read_job(config, console)
    dataset, spec, fingerprint = job.dataset, job.spec, job.fingerprint
    if elsewhere is not None:
        say(console, elsewhere.described())

    with writer_lock(config.output, config.rank.number), _explained(config):
        remove_abandoned(config.output, config.rank.world)
        # What is committed already, under the same settings.
        sidecars = committed_shards(config.output)
        fingerprint = settings_for_cache(config, fingerprint, sidecars, spec.folder, job.hasher)
        outcome.index = settled_index(config.output) if sidecars else None
        committed = committed_of(outcome.index)

        # What is missing of the dataset.
        planned, rejected = look_into_media(config, job, pool, committed, console)
        outcome.rejected = [*dataset.rejected, *rejected]
        if config.rank.number:  # what is wrong with the dataset is said once
            outcome.rejected = []
        write_rejected(rejected_file(config.output, config.rank.number), outcome.rejected)
        if not planned:
            listed = rejections(outcome.rejected, rejected_file(config.output, config.rank.number))
            raise UserError(f"dataset: {dataset.origin} has nothing that can be encoded.\n{listed}")
        if config.rank.world > 1:
            say(
                console,
                f"rank     {config.rank.number} of {config.rank.world}, "
                f"writer w{config.rank.number:03d}",
            )
        mine = [work for work in planned if config.rank.owns(work.home)]
        todo = [work for work in mine if missing_of(work, committed)]
        captions = [caption for work in todo for _, caption in missing_of(work, committed)]
        # One prompt bank is enough; the first rank brings it.
        bank = outcome.index.prompt_shards if outcome.index is not None else ()
        there = prompts_by_shard(config.output, bank) if config.rank.number == 0 else []
        prompts = missing_prompts(config, there) if config.rank.number == 0 else []
        validation = missing_validation(job.validation, there) if config.rank.number == 0 else None
        outcome.left = len(captions)
        live = {key for work in planned for key, _ in work.samples}
        replaced: dict[str, str] = {}
        if config.rank.number == 0 and outcome.index is not None:
            media = {entry.source: entry.path for entry in dataset.entries if entry.path}
            replaced = superseded(outcome.index, sidecars, media, live, pool, console)
        _say_plan(console, config, planned, mine, committed, outcome, replaced)
        leftover: list[str] = []
        if config.prune and config.rank.number == 0 and outcome.index is not None:
            unusable = {rejected.source for rejected in outcome.rejected}
            leftover = unlisted(outcome.index, live, unusable)

        texts = TextCache(config.output, fingerprint, config.rank.number)
        shards = ShardWriter(
            config.output,
            fingerprint,
            shard_bytes=config.shard_size_mb * 1_000_000,
            writer=config.rank.number,
        )
        writer = BackgroundWriter(shards)
        engine: Engine = LocalEngine(config, spec, pool, outcome.times)
        if elsewhere is not None:
            engine = elsewhere.engine(config, spec, fingerprint, signals, partial(say, console))

        try:
            # Text pass: each caption once; the encoder is gone before the VAE comes.
            if validation is not None:
                for text in validation.texts:
                    texts.put(text, validation.texts[text])
            to_sample = [] if validation is None else [one.prompt for one in validation.wanted]
            needed = list(dict.fromkeys([text for _, text in prompts] + to_sample + captions))
            if outcome.index is not None:
                texts_from_cache(todo, committed, outcome.index, texts)
            with bar(console, "encoding captions", len(needed)) as advance:
                engine.encode_texts(needed, texts, on_progress=advance)
            if prompts:
                with signals.deferred():
                    shards.add_prompts(
                        [Prompt(role, text, texts.get(text)) for role, text in prompts]
                    )
            if validation is not None:
                conditions = engine.encode_pictures(read_pictures(validation.pictures))
                with signals.deferred():
                    shards.add_prompts(validation.in_bank(texts.get, conditions))
                    outcome.validation = len(validation.wanted)

            # VAE pass. A clip that only has a new caption takes its latents from the old shard.
            text_only, known, new = _split(todo, committed)
            nothing = Encoded(latents=None, condition=None)
            encoded = chain(
                ((work, nothing) for work in text_only),
                latents_from_cache(known, outcome.index) if outcome.index is not None else (),
                engine.encode_media(new, texts),
            )
            with bar(console, "encoding media", len(todo)) as advance:
                for work, result in encoded:
                    missing = missing_of(work, committed)
                    if isinstance(result, MediaError):
                        source = work.entry.source
                        outcome.rejected.append(Rejected(source=source, reason=str(result)))
                    elif result is None:
                        outcome.written += len(missing)
                    else:
                        for sample, colours in samples_of(work, missing, result, texts):
                            with signals.deferred():
                                writer.add(sample, colours)
                                outcome.written += 1
                    advance()
            with signals.deferred():
                writer.close()
                outcome.times.end_media(writing=writer.waited)
                if went := report.where_time_went(outcome.times):
                    say(console, went)
                replaced = _with_successors(config, replaced, planned, outcome.rejected)
                if gone := {*leftover, *replaced}:
                    shards.add_tombstones(sorted(gone))
                    outcome.replaced = len(replaced)
                    outcome.removed = len(gone) - len(replaced)
                _finish(config, outcome, mine)
                texts.delete()
                remember_speed(config, fingerprint, outcome.times)
        except BaseException:  # a signal, a full disk, no memory: what is encoded is kept
            with signals.deferred(raise_after=False):
                engine.rescue()
                writer.rescue()
                with suppress(OSError):
                    _finish(config, outcome, mine)
            raise


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a configuration comes to before any medium is opened."""

    dataset: Dataset
    spec: ModelSpec
    fingerprint: Fingerprint
    hasher: FileHasher
    """With what it has learned of the encoders' files."""
    validation: Sequence[ValidationPrompt]
    """The list of --validation-prompts; empty without one."""


def read_job(config: EncodeConfig, console: Console) -> Job:
    """Read the dataset's list and the model's configs, and digest the encoders' weights.

    Raises UserError where the two do not fit, or one cannot be used.
    """
    dataset = _dataset(config)
    spec = _encodable_model(config)
    _refuse_text_only(dataset, spec)
    say(console, f"dataset  {dataset.origin}: {len(dataset.entries)} usable")
    say(console, f"model    {spec.folder} ({spec.mode}) on {config.device}")
    validation: Sequence[ValidationPrompt] = ()
    if config.validation_prompts is not None:
        rule = _clip_rule(config, spec)
        validation, said = read_validation_prompts(config.validation_prompts, spec, rule)
        listed = count(len(validation), "prompt")
        say(console, f"prompts  {config.validation_prompts}: {listed} for validation")
        for line in said:
            say(console, f"prompts  {line}")
    hasher = FileHasher()
    with console.status("digesting the encoders' weights (read once, then remembered)"):
        fingerprint = encode_fingerprint(config, spec, hasher)
    return Job(
        dataset=dataset, spec=spec, fingerprint=fingerprint, hasher=hasher, validation=validation
    )


def look_into_media(
    config: EncodeConfig, job: Job, pool: WorkerPool, committed: Captions, console: Console
) -> tuple[list[Work], list[Rejected]]:
    """`plan_work` for the job, with a progress bar."""
    entries = job.dataset.entries
    with bar(console, "looking into the media", len(entries)) as advance:
        return plan_work(
            entries,
            _clip_rule(config, job.spec),
            job.hasher,
            pool,
            committed=committed,
            on_progress=advance,
            video_repeat=config.video_repeat,
        )


def _dataset(config: EncodeConfig) -> Dataset:
    """What is to be encoded, as listed."""
    if config.dataset_config is not None:
        return load_dataset_config(config.dataset_config)
    return load_dataset(config.train_data_dir, config.train_data_meta)


def _encodable_model(config: EncodeConfig) -> ModelSpec:
    """The model whose encoders are used. Raises UserError for one that cannot be encoded for."""
    spec = read_model_spec(resolve_model(config.model, COMPONENTS))
    spec = in_train_mode(spec, config.train_mode)
    if config.engine == "local":
        check_device(config.device)
    return spec


def _refuse_text_only(dataset: Dataset, spec: ModelSpec) -> None:
    """UserError where an i2v model would get samples without a first frame."""
    alone = sum(entry.path is None for entry in dataset.entries)
    if alone and spec.mode == "i2v":
        raise UserError(
            f"dataset: {dataset.origin} has {count(alone, 'caption')} without a medium, and "
            f"{spec.folder} is an i2v model, which wants a first frame of each sample. Encode them "
            "for text-to-video (--train-mode normal, --output DIR), or leave them out."
        )


def _clip_rule(config: EncodeConfig, spec: ModelSpec) -> ClipRule:
    """What the command line says about samples."""
    return ClipRule(
        image_size=config.image_size,
        video_size=config.video_size,
        stride=config.stride,
        frames=config.video_sample_n_frames,
        seed=config.seed,
        multiple=spec.side_multiple,
        temporal_stride=spec.stride[0],
        fps=config.fps,
        token_budget=config.training_with_video_token_length,
        token_size=config.token_size,
        adapt=config.random_hw_adapt,
        buckets=config.enable_bucket,
        fixed_size=config.fix_sample_size,
        ratio_crop=config.random_ratio_crop,
        clips=config.clips,
        clips_per_video=config.clips_per_video,
        variants=config.variants,
    )


def _split(todo: Sequence[Work], committed: Captions) -> tuple[list[Work], list[Work], list[Work]]:
    """Captions without media; clips whose latents are in the shards under some caption; others."""
    alone: list[Work] = []
    known: list[Work] = []
    new: list[Work] = []
    for work in todo:
        there = any(key in committed for key, _ in work.samples)
        (alone if work.type == "text" else known if there else new).append(work)
    return alone, known, new


def missing_prompts(config: EncodeConfig, bank: list[list[Prompt]]) -> list[tuple[str, str]]:
    """(role, prompt) that the bank, by shard, lacks; the last entry of a role counts."""
    last = {prompt.role: prompt.prompt for shard in bank for prompt in shard}
    wanted = {EMPTY: "", NEGATIVE: config.negative_prompt}
    return [(role, text) for role, text in wanted.items() if last.get(role) != text]


def _say_plan(
    console: Console,
    config: EncodeConfig,
    planned: Sequence[Work],
    mine: Sequence[Work],
    committed: Captions,
    outcome: Outcome,
    replaced: Mapping[str, str],
) -> None:
    total = sum(len(work.samples) for work in mine)
    say(
        console, f"samples  {total}: {total - outcome.left} in the shards, {outcome.left} to encode"
    )
    live = {key for work in planned for key, _ in work.samples}
    if replaced:
        sources = count(len(set(replaced.values())), "source")
        say(
            console,
            f"replace  {count(len(replaced), 'sample')} of {sources} that an older frame "
            "rule misread (wanprep verify says why): once they are encoded again, the old ones go",
        )
    if gone := len(committed.keys() - live - replaced.keys()):
        say(
            console,
            f"leftover {gone} in the shards are not in this dataset (removed, or cut otherwise): "
            + (
                "removed from the cache at the end, but for files that were rejected now"
                if config.prune
                else "they stay and are trained on. To remove them: --prune"
            ),
        )
    for line in (
        report.short_clips(planned),
        report.repeated_frames(planned),
        report.noted(planned),
    ):
        if line:
            say(console, line)


def _with_successors(
    config: EncodeConfig,
    replaced: Mapping[str, str],
    planned: Sequence[Work],
    rejected: Sequence[Rejected],
) -> dict[str, str]:
    """Those of `replaced` (key → source) whose source has all of its new samples in the shards.

    Another rank may still have to make some, or a file was rejected: its old ones go in a later
    run. A copy of another file has no clips of its own, and waits for all.
    """
    if not replaced or not committed_shards(config.output):
        return {}
    committed = committed_of(settled_index(config.output))
    lacking = {work.entry.source for work in planned if missing_of(work, committed)}
    there = {work.entry.source for work in planned} - lacking
    unusable = {one.source for one in rejected}
    return {
        key: source
        for key, source in replaced.items()
        if source not in unusable and (source in there or not lacking)
    }


def _finish(config: EncodeConfig, outcome: Outcome, planned: Sequence[Work]) -> None:
    write_rejected(rejected_file(config.output, config.rank.number), outcome.rejected)
    if committed_shards(config.output):
        outcome.index = settled_index(config.output)
    committed = committed_of(outcome.index)
    outcome.left = sum(len(missing_of(work, committed)) for work in planned)


@contextmanager
def _explained(config: EncodeConfig) -> Iterator[None]:
    """Say what can be done about a full disk or a full GPU."""
    kept = "What was encoded so far is committed; the same command goes on from there."
    try:
        with refusals_explained(config.output, kept):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--device: {config.device} is out of memory ({str(error).splitlines()[0]}). Use "
            f"--vae-dtype bf16, a smaller --size, or free the device. {kept}"
        ) from error
