"""What a configuration comes to before any weight is read: which clips, of which fingerprint."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from shared.cache.index import live_columns
from shared.cache.session import KEPT
from shared.cli.console import count
from shared.device import chosen_device, take_device
from shared.format.cache import Sidecar, committed_shards
from shared.format.columns import hex_keys
from shared.format.fingerprint import Fingerprint, cache_mode, refuse_differences
from shared.format.schema import CONDITION_MEMBER, DTYPES, MEMBERS, TEXT_MEMBER
from shared.io.store import Store
from shared.models.spec import ModelSpec
from train.memory.forward_only import check_here
from train.model.base import Base
from train.options import Expert
from train.run import open_data
from train.synthesis.clips import Group, Source, described, plan_clips
from train.synthesis.config import SynthesizeConfig
from train.synthesis.expert import bases_of, identity_of, needed
from train.synthesis.sampler import Sampler, sampler_of

FULL_DEVICE = f"Use a smaller --batch-size, --base-precision int8 or --low-vram. {KEPT}"
"""What to do about it."""


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
    """That the experts compute on; of a cluster's nodes, once one is joined."""

    def on_cluster(self, device: str) -> "Job":
        """The same, once it is known what the nodes compute on."""
        return replace(self, config=replace(self.config, device=device), device=device)

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
        where = "a Ray cluster" if config.engine == "ray" else self.device
        lines = [
            f"model    {spec.folder} ({spec.mode}) on {where}",
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
    get wrong. The device stays open with Ray: a cluster's nodes may have what this machine lacks.
    """
    device = config.device
    if config.engine == "local":
        device = config.rank.device(chosen_device(device))
    spec, data = open_data(config, {})
    source = Source(data, spec)
    sampler, said = sampler_of(config, spec)
    bases = bases_of(config, spec)
    if config.engine == "local":
        use_device(config, device)
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


def use_device(config: SynthesizeConfig, device: str) -> None:
    """Have this thread compute there. UserError for what can't be computed there."""
    take_device(device)
    check_here(config, device)


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
