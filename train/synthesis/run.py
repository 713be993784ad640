"""`wantrain synthesize`: a cache's captions and conditions → the model's own clips, as shards.

    source cache → which clips → what is missing → high-noise expert → low-noise expert → shards

One expert is loaded at a time. Everything that is committed stays, however the run ends, and the
same command continues from there.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from shared.cache.background_writer import BackgroundWriter
from shared.cache.index import live_columns
from shared.cache.session import KEPT, CacheSession, Outcome, cache_session, stoppable
from shared.cli.console import bar, count
from shared.cli.support import say
from shared.device import chosen_device, full_device_explained, take_device
from shared.errors import UserError
from shared.format.cache import CacheIndex, Sidecar, committed_shards
from shared.format.columns import hex_keys
from shared.format.fingerprint import (
    Fingerprint,
    cache_mode,
    condition_tensor,
    refuse_differences,
)
from shared.format.prompts import Prompt, current_validation, prompts_by_shard
from shared.format.schema import (
    CONDITION_MEMBER,
    DTYPES,
    MEDIA_TYPES,
    MEMBERS,
    TEXT_MEMBER,
    Sample,
)
from shared.io.store import Store
from shared.models.spec import ModelSpec
from train.data.batches import MicroBatches, StoredBatch, load_prompt_bank
from train.memory.forward_only import check_here, loaded
from train.methods.flow_matching import with_clean_frames
from train.model.base import Base
from train.model.roles import Roles
from train.options import Expert
from train.run import open_data
from train.synthesis.clips import Group, Source, described, info_of, plan_clips
from train.synthesis.config import SynthesizeConfig
from train.synthesis.expert import bases_of, identity_of, needed
from train.synthesis.handover import HandedOver, Handover
from train.synthesis.sampler import Sampler, sampler_of

_VIDEO = MEDIA_TYPES.index("video")
_FULL = f"Use a smaller --batch-size, --base-precision int8 or --low-vram. {KEPT}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run with everything decided that needs no weights."""

    config: SynthesizeConfig
    spec: ModelSpec
    source: Source
    sampler: Sampler
    bases: dict[Expert, Base]
    fingerprint: Fingerprint
    """Of the new shards."""
    groups: list[Group]
    """All that the source comes to, of all ranks."""
    device: str

    @property
    def mine(self) -> list[Group]:
        """Those that this process makes: every world-th. Not by key, as in `encode`: of a few
        dozen clips of minutes each, one process would get half as many again as another."""
        rank = self.config.rank
        return self.groups[rank.number :: rank.world]

    def lacking(self, groups: Iterable[Group], committed: set[str]) -> list[str]:
        """Keys of their clips that are not `committed`."""
        return [clip.key for group in groups for clip in group.clips if clip.key not in committed]

    def describe(self) -> list[str]:
        """Lines for people."""
        spec, source, config = self.spec, self.source, self.config
        merged = [f"base     {e}: {text}" for e, b in self.bases.items() if (text := b.describe())]
        clips = count(sum(len(group.clips) for group in self.groups), "clip")
        lines = [
            f"model    {spec.folder} ({spec.mode}) on {self.device}",
            *merged,
            f"data     {len(source.data)} samples of {source.data.folders}: {clips}, "
            f"{described(self.groups)}",
            f"sampler  {self.sampler.describe()}",
        ]
        if source.texts_alone and spec.given_frames:
            lines.insert(
                -1, f"skipped  {source.texts_alone} text-only: an i2v model needs a first frame"
            )
        if config.rank.world > 1:
            lines.append(f"rank     {config.rank.number} of {config.rank.world}")
        return lines

    def bytes_each(self, group: Group) -> int:
        """About what one of its clips takes in shards."""
        spec, index = self.spec, self.source.index
        shape = group.bucket.latent_shape(spec.latent_channels, spec.stride)
        stored = DTYPES[self.fingerprint["latents"]["dtype"]].itemsize
        own = stored * torch.Size(shape).numel() * (1 + len(self.sampler.states))
        row = self.source.data.place(group.clips[0].row)[1]
        copied = [TEXT_MEMBER, *([CONDITION_MEMBER] if spec.given_frames else [])]
        return own + sum(int(index.lengths[row, MEMBERS.index(name)]) for name in copied)


def read_job(config: SynthesizeConfig) -> Job:
    """Read configs and index, and digest the weights' beginnings. UserError for all that a user can
    get wrong."""
    device = config.rank.device(chosen_device(config.device))
    spec, data = open_data(config, {})
    source = Source(data, spec)
    sampler, said = sampler_of(config, spec)
    bases = bases_of(config, spec)
    take_device(device)
    check_here(config, device)
    fingerprint = fingerprint_of(
        source.index.fingerprint, spec, said | identity_of(config, spec, bases)
    )
    groups = plan_clips(
        source, fingerprint, count=config.count, each=config.clips_per_caption,
        size=config.train_batch_size,
    )  # fmt: skip
    return Job(
        config=config,
        spec=spec,
        source=source,
        sampler=sampler,
        bases=bases,
        fingerprint=fingerprint,
        groups=groups,
        device=device,
    )


def fingerprint_of(
    original: Fingerprint, spec: ModelSpec, synthesis: dict[str, object]
) -> Fingerprint:
    """That of clips made from a cache's samples: the cache's, what the model takes of conditions,
    and how they were made."""
    kept = {
        name: value
        for name, value in original.items()
        if name != "synthesis" and (name != "image" or spec.image_dim is not None)
    }
    return {**kept, "mode": cache_mode(spec), "synthesis": synthesis}


def settings_for(job: Job, output: Store, sidecars: list[Sidecar]) -> Fingerprint:
    """The run's fingerprint. UserError where `output` has shards that were made otherwise."""
    for sidecar in sidecars:
        refuse_differences(
            sidecar.fingerprint,
            job.fingerprint,
            what=f"shards: {output.shown(output.folder / sidecar.shard)} was made with other "
            "settings than these",
            cure="Give this run a folder of its own (--output), or set the values that the shards "
            "have.",
        )
    return job.fingerprint


def foresee(job: Job, output: Store) -> list[str]:
    """Lines for people about what `synthesize` would do; nothing is written. UserError where it
    would refuse to begin."""
    sidecars = committed_shards(output.folder) if output.folder.is_dir() else []
    settings_for(job, output, sidecars)
    there = set(hex_keys(live_columns(output)[0]["key"])) if sidecars else set[str]()
    new = [(g, sum(clip.key not in there for clip in g.clips)) for g in job.groups]
    clips, left = sum(len(g.clips) for g in job.groups), sum(number for _, number in new)
    size = sum(number * job.bytes_each(group) for group, number in new)
    memory = needed(job.config, job.spec, job.groups)
    return [
        f"clips    {clips}: {clips - left} in the shards, {left} to make in "
        f"{left * job.sampler.passes} transformer passes (of one clip each); about "
        f"{size / 1e6:.1f} MB of shards",
        *([] if memory is None else [memory.line()]),
    ]


def synthesize(job: Job, output: Store, console: Console) -> Outcome:
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
        run = _Run(job, session, writer, console)
        with session.rescued(writer.rescue), full_device_explained(job.device, lambda: _FULL):
            run.copy_prompts()
            run.make({*missing})
            with signals.deferred():
                writer.close()
                session.settle()
                if not outcome.left:
                    run.handover.delete([clip.key for group in mine for clip in group.clips])
    return outcome


def _keys(index: CacheIndex | None) -> set[str]:
    return set() if index is None else set(index.hex_keys())


class _Run:
    """What the passes work with."""

    def __init__(
        self, job: Job, session: CacheSession, writer: BackgroundWriter, console: Console
    ) -> None:
        self._job = job
        self._session = session
        self._writer = writer
        self._console = console
        self._device = torch.device(job.device)
        self._dtype = DTYPES[job.fingerprint["latents"]["dtype"]]
        self.handover = Handover(session.store.folder, job.fingerprint)
        bank = load_prompt_bank(job.source.index, job.spec.family)
        self._negative = bank.negative.to(self._device)
        self._reader = MicroBatches.of_whole_samples(job.source.data, job.spec, bank)

    def copy_prompts(self) -> None:
        """The source's prompt bank, by the first rank, unless one is there."""
        index = self._session.outcome.index
        if self._session.rank.number or (index is not None and index.prompt_shards):
            return
        source = self._job.source.index
        found = prompts_by_shard(source.store, source.prompt_shards)
        overlay = source.overlays.get(TEXT_MEMBER)
        if overlay is not None:
            found = prompts_by_shard(overlay.index.store, overlay.index.prompt_shards)
        roles: dict[str, Prompt] = {p.role: p for shard in found for p in shard if p.bucket is None}
        validation = current_validation(found) if overlay is None else []
        with self._session.signals.deferred():
            self._writer.shards.add_prompts([*roles.values(), *validation])

    def make(self, missing: set[str]) -> None:
        """Sample the groups that have a clip among `missing`, and hand those to the writer."""
        job = self._job
        todo = [g for g in job.mine if any(clip.key in missing for clip in g.clips)]
        first, *second = job.sampler.experts
        began, done = time.monotonic(), 0
        turns = [(first, todo)]
        if second:
            waiting = [g for g in todo if any(self.handover.get(c.key) is None for c in g.clips)]
            turns = [(first, waiting), (second[0], todo)]
        for (expert, places), groups in turns:
            if not groups:
                continue
            passes = len(places) * job.sampler.passes_each
            clips = sum(len(group.clips) for group in groups)
            say(self._console, f"expert   {expert}: {count(clips, 'clip')}, {passes} passes each")
            tell, attention = partial(say, self._console), job.config.attention_backend
            memory, base = job.config.memory, job.bases[expert]
            with (
                loaded(job.spec, expert, base, memory, attention, self._device, tell) as roles,
                bar(self._console, f"sampling ({expert})", clips * passes) as advance,
            ):
                for group in groups:
                    self._sample(roles, group, places, missing, advance)
            done += clips * passes
        if done:
            spent = time.monotonic() - began
            say(
                self._console,
                f"time     {spent:.1f} s for {done} passes of a clip, {spent / done:.3f} s each; "
                f"waiting for the disk {self._writer.waited:.1f} s",
            )

    def _sample(
        self,
        roles: Roles,
        group: Group,
        places: range,
        missing: set[str],
        advance: Callable[..., None],
    ) -> None:
        """Take a group through its levels at `places`."""
        job, clips = self._job, group.clips
        sampler, last = job.sampler, places.stop == len(job.sampler.sigmas)
        stored = self._read(group)
        batch = stored.to(self._device)
        keys = [clip.noise for clip in clips]
        states: list[torch.Tensor] = []  # each (B, C, T, H, W), on the CPU as it is stored
        before: list[torch.Tensor] | None = None
        if places.start == 0:
            noise = sampler.noise(keys, batch.latents.shape[1:], 0).to(self._device)
            x_t = with_clean_frames(batch, noise)
        else:
            handed = [self.handover.get(clip.key) for clip in clips]
            assert None not in handed
            there = [one for one in handed if one is not None]
            x_t = torch.stack([one.x_t for one in there]).to(self._device)
            before = [one.states for one in there]
        path = sampler.path(roles, batch, keys, self._negative, x_t, places.start)
        for place, x_t in enumerate(path, start=places.start):
            if place > places.start:
                advance(len(clips) * sampler.passes_each)
            if place == places.stop:
                break
            if place in sampler.states:
                states.append(x_t.to("cpu", self._dtype))
        if not bool(torch.isfinite(x_t).all()):
            raise UserError(
                f"model: {job.spec.folder} gave NaN or infinite values for clip {clips[0].key} (or "
                "one sampled with it). Try --mixed-precision no, or without --base-precision."
            )
        for number, clip in enumerate(clips):
            own = torch.stack([s[number] for s in states]) if states else self._none(x_t)
            if before is not None:
                own = torch.cat([before[number], own])
            if not last:
                with self._session.signals.deferred():
                    self.handover.put(clip.key, HandedOver(x_t[number].cpu(), own))
            elif clip.key in missing:
                self._write(stored, group, number, x_t[number].to("cpu", self._dtype), own)

    def _none(self, x_t: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, *x_t.shape[1:], dtype=self._dtype)

    def _read(self, group: Group) -> StoredBatch:
        """The group's samples. Of ti2v, videos keep their first frame."""
        job, data = self._job, self._job.source.data
        rows = [clip.row for clip in group.clips]
        from_image = job.config.train_mode != "normal" and group.bucket.frames > 1
        conditioned = [from_image and int(data.types[row]) == _VIDEO for row in rows]
        return self._reader.whole_samples(rows, tuple(range(len(rows))), conditioned=conditioned)

    def _write(
        self, stored: StoredBatch, group: Group, number: int, latents: torch.Tensor,
        states: torch.Tensor,
    ) -> None:  # fmt: skip
        clip = group.clips[number]
        original = self._job.source.info(clip.row)
        cond, image = stored.condition, stored.image
        own = None if cond is None else cond[number].clone()
        name = condition_tensor(self._job.spec.mode)
        sample = Sample(
            key=clip.key,
            info=info_of(clip, original),
            latents=latents,
            text=stored.texts[number].clone(),
            cond=own if name == "cond" else None,
            first_last=own if name == "first_last" else None,
            clip=None if image is None else image[number].clone(),
            states=states if len(states) else None,
        )
        with self._session.signals.deferred():
            self._writer.add(sample)
        self._session.outcome.written += 1
