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
            began, turns = time.monotonic(), _turns(job, handover, {*missing})
            if passes := _make(job, turns, {*missing}, engine, outcome, console):
                # On a cluster it is the actors that wait for the disk.
                waited = writer.waited if job.config.engine == "local" else None
                say(console, _time_line(time.monotonic() - began, passes, waited))
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


def _turns(job: Job, handover: Handover, missing: set[str]) -> list[Turn]:
    """What each expert has to do for the clips that are `missing`."""
    todo = [g for g in job.mine if any(clip.key in missing for clip in g.clips)]
    (first, places), *second = job.sampler.experts
    if not second:
        return [Turn(expert=first, places=places, groups=todo)]
    ((last, rest),) = second
    return [
        Turn(expert=first, places=places, groups=handover.lacking(todo)),
        Turn(expert=last, places=rest, groups=todo),
    ]


def _make(
    job: Job,
    turns: list[Turn],
    missing: set[str],
    engine: Engine,
    outcome: Outcome,
    console: Console,
) -> int:
    """Sample clips, which are then in shards or on the way there; the passes that it took."""
    done = 0
    for turn in turns:
        if not turn.groups:
            continue
        passes = len(turn.places) * job.sampler.passes_each
        clips = sum(len(group.clips) for group in turn.groups)
        say(console, f"expert   {turn.expert}: {count(clips, 'clip')}, {passes} passes each")
        with bar(console, f"sampling ({turn.expert})", clips * passes) as advance:
            for group in engine.make(turn, missing, advance):
                if turn is turns[-1]:
                    outcome.written += sum(clip.key in missing for clip in group.clips)
        done += clips * passes
    return done


def _time_line(spent: float, passes: int, waited: float | None) -> str:
    """What it took; `waited` of it for the disk, where that is known."""
    line = f"time     {spent:.1f} s for {passes} passes of a clip, {spent / passes:.3f} s each"
    return line if waited is None else f"{line}; waiting for the disk {waited:.1f} s"
