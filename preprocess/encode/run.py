"""The loop of stage one: media and captions → shards.

    dataset → plan (probe, clip, key) → what is missing → text pass → VAE pass → index

The text encoder and the VAE are never in memory together. Everything that is committed stays,
however the run ends, and the same command continues from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

from rich.console import Console

from preprocess.cache.remove import unlisted
from preprocess.cache.text_cache import TextCache
from preprocess.dataset.clips import ClipRule
from preprocess.dataset.entry import Dataset
from preprocess.dataset.left_out import account
from preprocess.dataset.old_samples import superseded
from preprocess.dataset.toml_config import read_dataset
from preprocess.encode import report
from preprocess.encode.config import EncodeConfig, encoded_for
from preprocess.encode.engine import COMPONENTS, Elsewhere, Engine, LocalEngine
from preprocess.encode.fingerprint import DIGESTING, encode_fingerprint, settings_for_cache
from preprocess.encode.passes import Encoded, latents_from_cache, samples_of, texts_from_cache
from preprocess.encode.speed import Times, remember_speed
from preprocess.encode.validation_prompts import (
    MissingPrompts,
    ValidationPrompt,
    missing_roles,
    missing_validation,
    read_pictures,
    read_validation_prompts,
)
from preprocess.encode.work import Captions, Work, committed_of, missing_of, plan_work, split
from preprocess.frames.media_info import MediaError
from preprocess.media.worker_pool import WorkerPool
from shared.cache.background_writer import BackgroundWriter
from shared.cache.rejected import Rejected, rejections, write_rejected
from shared.cache.session import (
    KEPT,
    CacheSession,
    Outcome,
    cache_session,
    index_there,
    stoppable,
)
from shared.cli.console import bar, count
from shared.cli.support import say
from shared.device import full_device_explained, take_device
from shared.errors import UserError
from shared.format.fingerprint import Fingerprint
from shared.format.prompts import EMPTY, NEGATIVE, Prompt, prompts_by_shard
from shared.io.hashing import FileHasher
from shared.io.store import Store
from shared.models.spec import ModelSpec, read_model_spec, resolve_model

_FULL = f"Use --vae-dtype bf16, a smaller --size, or free the device. {KEPT}"


@dataclass(kw_only=True)
class EncodeOutcome(Outcome):
    """How a run of `encode` ended."""

    validation: int = 0
    """Validation prompts, where this run wrote their list."""
    replaced: int = 0
    """Samples that an older frame rule had misread and that were taken out for new ones."""
    times: Times = field(default_factory=Times)


def encode(
    config: EncodeConfig, output: Store, console: Console, elsewhere: Elsewhere | None = None
) -> EncodeOutcome:
    """Bring the cache in `output`, which is that of `config`, up to date with the dataset.

    The encoders run in this process, or `elsewhere`.
    Raises UserError for what the user can mend; rejected samples and signals are in the outcome.
    """
    assert (elsewhere is not None) == (config.engine == "ray")
    outcome = EncodeOutcome()
    if elsewhere is not None:
        config = replace(config, device=elsewhere.device)
    with (
        stoppable(outcome) as signals,
        # First of all: the workers get up while weights are digested.
        WorkerPool(config.workers, timeout=config.decode_timeout) as pool,
    ):
        # What there is: the dataset and the model.
        job = read_job(config, output, console)
        if elsewhere is not None:
            say(console, elsewhere.described)
        settings = partial(
            settings_for_cache, config, output, job.fingerprint, job.spec.folder, job.hasher
        )

        with (
            full_device_explained(config.device, lambda: _FULL),
            cache_session(output, config.rank, signals, outcome, settings) as session,
        ):
            # What the shards lack of it, and what they have too much.
            plan = _plan(job, pool, session, console)
            mine = [work for work in plan.works if config.rank.owns(work.home)]
            missing = session.lacking(lambda index: _missing(mine, committed_of(index)))
            todo = [work for work in mine if missing_of(work, plan.committed)]
            outdated = _outdated(job, plan, session, pool, console)
            _print_plan(console, config, plan, mine, outcome.left, outdated)

            # Who encodes, and where it goes.
            engine: Engine = LocalEngine(config, job.spec, pool, outcome.times)
            if elsewhere is not None:
                said = partial(say, console)
                engine = elsewhere.engine(
                    config, output, job.spec, session.fingerprint, signals, said
                )
            writer = BackgroundWriter(session.writer(config.shard_size_mb * 1_000_000))
            run = _Run(plan, session, outcome, engine, writer, console)
            with session.rescued(engine.rescue, writer.rescue):
                # Each caption once; the text encoder is gone before the VAE comes.
                _text_pass(run, todo, [caption for _, caption in missing])
                _media_pass(run, todo)

                # What was written is committed, what is outdated goes.
                with signals.deferred():
                    writer.close()
                    if line := report.where_time_went(outcome.times, writing=writer.waited):
                        say(console, line)
                    _take_out(run, outdated)
                    session.settle()
                    TextCache.of(session).delete()
                    remember_speed(config, session.fingerprint, outcome.times)
    return outcome


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a configuration comes to before any media file is opened."""

    config: EncodeConfig
    output: Store
    dataset: Dataset
    spec: ModelSpec
    fingerprint: Fingerprint
    hasher: FileHasher
    """With what it has learned of the encoders' files."""
    validation: Sequence[ValidationPrompt]
    """The list of --validation-prompts; empty without one."""


def read_job(config: EncodeConfig, output: Store, console: Console) -> Job:
    """Read the dataset's list and the model's configs, and digest the encoders' weights.

    Raises UserError where the two do not fit, or one cannot be used.
    """
    dataset = read_dataset(config.dataset_config, config.train_data_dir, config.train_data_meta)
    spec = read_model_spec(resolve_model(config.model, COMPONENTS))
    spec = encoded_for(spec, config.train_mode)
    if config.engine == "local":
        take_device(config.device)
    _refuse_text_only(dataset, spec)
    say(console, f"dataset  {dataset.origin}: {len(dataset.entries)} usable")
    for line in account(dataset.tallies, dataset.left_out):
        say(console, line)
    say(console, f"model    {spec.folder} ({spec.mode}) on {config.device}")
    validation: Sequence[ValidationPrompt] = ()
    if config.validation_prompts is not None:
        rule = _clip_rule(config, spec)
        validation, note = read_validation_prompts(config.validation_prompts, spec, rule)
        listed = count(len(validation), "prompt")
        say(console, f"prompts  {config.validation_prompts}: {listed} for validation")
        if note:
            say(console, f"prompts  {note}")
    hasher = FileHasher()
    with console.status(DIGESTING):
        fingerprint = encode_fingerprint(config, spec, hasher)
    return Job(
        config=config,
        output=output,
        dataset=dataset,
        spec=spec,
        fingerprint=fingerprint,
        hasher=hasher,
        validation=validation,
    )


def _refuse_text_only(dataset: Dataset, spec: ModelSpec) -> None:
    """UserError where an i2v model would get samples without a first frame."""
    text_only = sum(entry.path is None for entry in dataset.entries)
    if text_only and spec.given_frames:
        raise UserError(
            f"dataset: {dataset.origin} has {count(text_only, 'text-only caption')}, and "
            f"{spec.folder} is an {spec.mode} model, which needs a first frame for each. Encode "
            "them for text-to-video (--train-mode normal, --output DIR), or leave them out."
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a dataset comes to, and what of it a cache lacks."""

    works: Sequence[Work]
    """All clips of the dataset."""
    rejected: Sequence[Rejected]
    """Media that cannot be used."""
    committed: Captions
    """What is in the shards."""
    prompts: Sequence[tuple[str, str]]
    """(role, prompt) that the prompt bank lacks."""
    validation: MissingPrompts

    @property
    def live(self) -> set[str]:
        """Keys of all samples."""
        return {key for work in self.works for key, _ in work.samples}

    @property
    def prompt_texts(self) -> list[str]:
        """What is to be encoded of prompts."""
        roles, listed = self.prompts, self.validation.wanted
        return [text for _, text in roles] + [one.prompt for one in listed]


def plan_job(
    job: Job,
    pool: WorkerPool,
    committed: Captions,
    bank: Sequence[str] | None,
    console: Console,
) -> Plan:
    """Probe the media, with a progress bar.

    `bank`: the prompts' shards in the output; None where others bring what these lack.
    """
    config, entries = job.config, job.dataset.entries
    with bar(console, "probing media", len(entries)) as advance:
        works, rejected = plan_work(
            entries,
            _clip_rule(config, job.spec),
            job.hasher,
            pool,
            committed=committed,
            on_progress=advance,
            video_repeat=config.video_repeat,
        )
    there = prompts_by_shard(job.output, tuple(bank or ()))
    wanted = {EMPTY: "", NEGATIVE: config.negative_prompt}
    return Plan(
        works=works,
        rejected=rejected,
        committed=committed,
        prompts=() if bank is None else missing_roles(wanted, there),
        validation=missing_validation(() if bank is None else job.validation, there),
    )


def _plan(job: Job, pool: WorkerPool, session: CacheSession, console: Console) -> Plan:
    """`plan_job` for this rank; the first one brings the prompts, and errors are reported once.

    Raises UserError where nothing can be encoded.
    """
    outcome, first = session.outcome, session.rank.number == 0
    bank = () if outcome.index is None else outcome.index.prompt_shards
    plan = plan_job(job, pool, committed_of(outcome.index), bank if first else None, console)
    outcome.rejected = [*job.dataset.rejected, *plan.rejected] if first else []
    write_rejected(session.store, session.rank.number, outcome.rejected)
    if not plan.works:
        raise UserError(
            f"dataset: {job.dataset.origin} has nothing that can be encoded.\n"
            + rejections(outcome.rejected, session.store, session.rank.number)
        )
    return plan


def _missing(works: Sequence[Work], committed: Captions) -> list[tuple[str, str]]:
    """(key, caption) of all samples of these clips that the shards lack."""
    return [sample for work in works for sample in missing_of(work, committed)]


@dataclass(frozen=True, kw_only=True)
class _Outdated:
    """Samples of the cache that go at the end of the run; the first rank sees to it."""

    leftover: Sequence[str] = ()
    """Keys that the dataset does not give any more (--prune)."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Key → source of those that an older frame rule misread."""


def _outdated(
    job: Job, plan: Plan, session: CacheSession, pool: WorkerPool, console: Console
) -> _Outdated:
    index, live = session.outcome.index, plan.live
    if index is None or session.rank.number:
        return _Outdated()
    media = {entry.source: entry.path for entry in job.dataset.entries if entry.path}
    unusable = {rejected.source for rejected in session.outcome.rejected}
    return _Outdated(
        replaced=superseded(index, session.sidecars, media, live, pool, console),
        leftover=unlisted(index, live, unusable) if job.config.prune else (),
    )


def _print_plan(
    console: Console,
    config: EncodeConfig,
    plan: Plan,
    mine: Sequence[Work],
    left: int,
    gone: _Outdated,
) -> None:
    rank, replaced = config.rank, gone.replaced
    if rank.world > 1:
        say(console, f"rank     {rank.number} of {rank.world}, writer w{rank.number:03d}")
    total = sum(len(work.samples) for work in mine)
    say(console, f"samples  {total}: {total - left} in the shards, {left} to encode")
    if replaced:
        sources = count(len(set(replaced.values())), "source")
        say(
            console,
            f"replace  {count(len(replaced), 'sample')} of {sources} that an older frame "
            "rule misread (wanprep verify says why): once they are encoded again, the old ones go",
        )
    if old := len(plan.committed.keys() - plan.live - replaced.keys()):
        say(
            console,
            f"leftover {old} in the shards are not in this dataset (removed or changed): "
            + (
                "removed from the cache at the end, but for files that were rejected now"
                if config.prune
                else "they stay and are trained on. To remove them: --prune"
            ),
        )
    for line in report.oddities(plan.works):
        say(console, line)


@dataclass(frozen=True)
class _Run:
    """What the passes work with."""

    plan: Plan
    session: CacheSession
    outcome: EncodeOutcome
    engine: Engine
    writer: BackgroundWriter
    console: Console


def _text_pass(run: _Run, todo: Sequence[Work], captions: Sequence[str]) -> None:
    """Captions and prompts → embeddings, in the session's `TextCache`; prompts → shards."""
    plan, texts, shards = run.plan, TextCache.of(run.session), run.writer.shards

    # What the cache has already is not encoded again.
    for text, embedding in plan.validation.texts.items():
        texts.put(text, embedding)
    if run.outcome.index is not None:
        texts_from_cache(todo, plan.committed, run.outcome.index, texts)
    needed = list(dict.fromkeys([*plan.prompt_texts, *captions]))
    with bar(run.console, "encoding captions", len(needed)) as advance:
        for _ in run.engine.encode_texts(needed, texts):
            advance()

    if plan.prompts:
        with run.session.signals.deferred():
            shards.add_prompts([Prompt(role, text, texts.get(text)) for role, text in plan.prompts])
    if plan.validation.wanted:
        conditions = run.engine.encode_pictures(read_pictures(plan.validation.pictures))
        with run.session.signals.deferred():
            shards.add_prompts(plan.validation.in_bank(texts.get, conditions))
            run.outcome.validation = len(plan.validation.wanted)


def _media_pass(run: _Run, todo: Sequence[Work]) -> None:
    """Clips → samples in shards. One that only has a new caption takes the old shard's latents."""
    committed, outcome, texts = run.plan.committed, run.outcome, TextCache.of(run.session)

    def write(work: Work, encoded: Encoded) -> None:
        wanted = missing_of(work, committed)
        for sample, frames in samples_of(work, wanted, encoded, texts):
            with run.session.signals.deferred():
                run.writer.add(sample, frames)

    def done(work: Work, error: MediaError | None = None) -> None:
        if error is None:
            outcome.written += len(missing_of(work, committed))
        else:
            outcome.reject(work.entry.source, error)
        advance()

    text_only, known, new = split(todo, committed)
    nothing = Encoded(latents=None, condition={})
    there = latents_from_cache(known, outcome.index) if outcome.index is not None else ()
    with bar(run.console, "encoding media", len(todo)) as advance:
        for work, encoded in chain(((work, nothing) for work in text_only), there):
            write(work, encoded)
            done(work)
        for work, error in run.engine.encode_media(new, write):
            done(work, error)


def _take_out(run: _Run, outdated: _Outdated) -> None:
    """Remove what is outdated from the cache.

    Of misread samples those whose source has all of its new samples in the shards: another rank
    may still have to make some, or a file was rejected, and then its old ones go in a later run. A
    copy of another file has no clips of its own, and waits for all.
    """
    replaced: list[str] = []
    if outdated.replaced:
        committed = committed_of(index_there(run.session.store))
        sources = {work.entry.source for work in run.plan.works}
        lacking = {work.entry.source for work in run.plan.works if missing_of(work, committed)}
        unusable = {one.source for one in run.outcome.rejected}
        replaced = [
            key
            for key, source in outdated.replaced.items()
            if source not in unusable and (source in sources - lacking or not lacking)
        ]
    if gone := {*outdated.leftover, *replaced}:
        run.writer.shards.add_tombstones(sorted(gone))
        run.outcome.replaced = len(replaced)
        run.outcome.removed = len(gone) - len(replaced)
