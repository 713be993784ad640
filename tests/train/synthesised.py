"""Caches with a sampler's states, as `wantrain synthesize --states` writes them: made up here."""

from collections.abc import Sequence
from pathlib import Path

import torch

from shared.cache.index import build_index
from shared.cache.writer import ShardWriter
from shared.format.cache import MemberReader, open_cache
from shared.format.prompts import read_prompts
from shared.format.schema import (
    JSON_MEMBER,
    LATENTS_MEMBER,
    MEMBERS,
    STATES_MEMBER,
    pack,
    unpack,
)
from shared.io.store import Store


def timesteps(shift: float, indices: Sequence[float] = (1000, 750, 500, 250)) -> list[float]:
    """Of the student's steps."""
    return [1000 * shift * u / (1000 + (shift - 1) * u) for u in indices]


def with_states(
    shards: Path, output: Path, steps: Sequence[float], *, clean_first: bool = False
) -> Path:
    """A copy of a cache whose samples have states that no straight line goes through.

    `clean_first`: videos keep latent frame 0, as ti2v's paths from an image do.
    """
    index = open_cache(Store(shards))
    synthesis = {
        "model": "m", "steps": 40, "guidance": 5.0, "flow_shift": 5.0, "seed": 1,
        "states": {"timesteps": list(steps)},
    }  # fmt: skip
    output.mkdir(parents=True)
    store, reader = Store(output), MemberReader(index)
    writer = ShardWriter(store, {**index.fingerprint, "synthesis": synthesis}, shard_bytes=10**9)
    writer.add_prompts(list(read_prompts(index.store, index.prompt_shards)))
    for row in range(len(index)):
        members = {name: reader.raw(row, name) for name in MEMBERS if name != STATES_MEMBER}
        members = {name: data for name, data in members.items() if data}
        latents = unpack(members[LATENTS_MEMBER], LATENTS_MEMBER)["latents"]
        members[STATES_MEMBER] = pack(states=states_of(latents, steps, row, clean_first))
        assert JSON_MEMBER in members
        writer.add_members(index.key(row), index.buckets[index.bucket_ids[row]], members)
    reader.close()
    writer.close()
    build_index(store)
    return output


def states_of(
    latents: torch.Tensor, steps: Sequence[float], row: int, clean_first: bool = False
) -> torch.Tensor:
    """(S, C, T, h, w), of a curved path from noise to `latents` in their dtype."""
    rng = torch.Generator().manual_seed(100 + row)
    start, bend = (torch.randn(latents.shape, generator=rng) for _ in range(2))
    sigmas = [step / 1000 for step in steps]
    states = torch.stack(
        [s * start + (1 - s) * latents.float() + s * (1 - s) * bend for s in sigmas]
    ).to(latents.dtype)
    if clean_first and latents.shape[1] > 1:
        states[:, :, 0] = latents[:, 0]
    return states
