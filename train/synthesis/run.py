"""`wantrain synthesize`: a cache's captions and conditions → the model's own clips, as shards.

    source cache → which clips → what is missing → high-noise expert → low-noise expert → shards

One expert is loaded at a time. Everything that is committed stays, however the run ends, and the
same command continues from there.
"""

import time
from functools import partial

from rich.console import Console

from shared.cache.background_writer import BackgroundWriter
from shared.cache.session import CacheSession, Outcome, cache_session, stoppable
from shared.cli.console import bar, count
from shared.cli.support import say
from shared.device import full_device_explained
from shared.format.cache import CacheIndex
from shared.format.prompts import Prompt, current_validation, prompts_by_shard
from shared.format.schema import TEXT_MEMBER
from shared.io.store import Store
from train.synthesis.engine import Engine, LocalEngine, MakeEngine, Turn
from train.synthesis.handover import Handover
from train.synthesis.job import FULL_DEVICE, Job, settings_for


def synthesize(
    job: Job, output: Store, console: Console, engine_of: MakeEngine = LocalEngine
) -> Outcome:
    """Bring the shards in `output` up to date with what the job asks for.

    Raises UserError for what the user can mend; a signal is in the outcome.
    """
    outcome = Outcome()
    with (
        stoppable(outcome) as signals,
        cache_session(
            output, job.config.rank, signals, outcome, partial(settings_for, job, output)
        ) as session,
    ):
        mine = job.mine
        missing = session.lacking(lambda index: job.lacking(mine, _keys(index)))
        total = sum(len(group.clips) for group in mine)
        say(
            console,
            f"clips    {total}: {total - len(missing)} in the shards, {len(missing)} to make",
        )
        writer = BackgroundWriter(session.writer(job.config.shard_size_mb * 1_000_000))
        handover = Handover(output.folder, job.fingerprint)
        engine = engine_of(job, session, handover, writer, partial(say, console))
        with (
            session.rescued(engine.rescue, writer.rescue),
            full_device_explained(job.device, lambda: FULL_DEVICE),
        ):
            _copy_prompts(job, session, writer)
            _make({*missing}, job, session, handover, writer, engine, console)
            with signals.deferred():
                writer.close()
                session.settle()
                if not outcome.left:
                    handover.delete([clip.key for group in mine for clip in group.clips])
    return outcome


def _keys(index: CacheIndex | None) -> set[str]:
    return set() if index is None else set(index.hex_keys())


def _copy_prompts(job: Job, session: CacheSession, writer: BackgroundWriter) -> None:
    """The source's prompt bank, by the first rank, unless one is there."""
    index = session.outcome.index
    if session.rank.number or (index is not None and index.prompt_shards):
        return
    source = job.source.index
    found = prompts_by_shard(source.store, source.prompt_shards)
    overlay = source.overlays.get(TEXT_MEMBER)
    if overlay is not None:
        found = prompts_by_shard(overlay.index.store, overlay.index.prompt_shards)
    roles: dict[str, Prompt] = {p.role: p for shard in found for p in shard if p.bucket is None}
    validation = current_validation(found) if overlay is None else []
    with session.signals.deferred():
        writer.shards.add_prompts([*roles.values(), *validation])


def _make(
    missing: set[str],
    job: Job,
    session: CacheSession,
    handover: Handover,
    writer: BackgroundWriter,
    engine: Engine,
    console: Console,
) -> None:
    """Sample the groups that have a clip among `missing`, which are then in shards or on the way
    there."""
    todo = [g for g in job.mine if any(clip.key in missing for clip in g.clips)]
    first, *second = job.sampler.experts
    turns = [Turn(expert=first[0], places=first[1], groups=todo)]
    if second:
        turns = [
            Turn(expert=first[0], places=first[1], groups=handover.lacking(todo)),
            Turn(expert=second[0][0], places=second[0][1], groups=todo),
        ]
    began, done = time.monotonic(), 0
    for turn in turns:
        if not turn.groups:
            continue
        passes = len(turn.places) * job.sampler.passes_each
        clips = sum(len(group.clips) for group in turn.groups)
        say(console, f"expert   {turn.expert}: {count(clips, 'clip')}, {passes} passes each")
        with bar(console, f"sampling ({turn.expert})", clips * passes) as advance:
            for group in engine.make(turn, missing, advance):
                if turn is turns[-1]:
                    session.outcome.written += sum(clip.key in missing for clip in group.clips)
        done += clips * passes
    if done:
        spent = time.monotonic() - began
        here = job.config.engine == "local"
        waited = f"; waiting for the disk {writer.waited:.1f} s" if here else ""
        say(
            console,
            f"time     {spent:.1f} s for {done} passes of a clip, {spent / done:.3f} s "
            f"each{waited}",
        )
