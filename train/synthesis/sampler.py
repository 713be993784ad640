"""The sampler of synthesised clips: its noise levels, whose they are, which states are kept."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from shared.format.buckets import Bucket
from shared.models.spec import TIMESTEPS, ModelSpec
from train.data.batches import Batch
from train.functional.rng import counted_rng
from train.functional.schedule import Schedule, even_levels, step_indices, steps_by_expert
from train.methods.flow_matching import guided_velocity, trajectory
from train.model.roles import Roles
from train.options import Expert, Pairing
from train.synthesis.config import STEPS, SynthesizeConfig

# Levels nearer to one another than this are one: a step between them would do nothing.
_SAME_LEVEL = 1e-6
_NOISE = "synthesis"
"""Stream of the noise."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a clip is made. Raises UserError for steps that are none."""

    sigmas: tuple[float, ...]
    """Falling, float64; behind the last is the clip, at 0."""
    states: tuple[int, ...]
    """Places in `sigmas` whose x_t is stored."""
    boundary: float | None
    """Share of the timesteps at and above which the high-noise expert works; None: one expert."""
    guidance: float
    batched_guidance: bool
    pairing: Pairing
    seed: int

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the stored states."""
        return tuple(TIMESTEPS * self.sigmas[place] for place in self.states)

    @property
    def experts(self) -> tuple[tuple[Expert, range], ...]:
        """Whose turn it is, and the places in `sigmas` that are its; none without a place."""
        return tuple(steps_by_expert(self.sigmas, self.boundary).items())

    @property
    def passes_each(self) -> int:
        """Transformer passes of a clip at one level."""
        return 1 if self.guidance in (0, 1) else 2

    @property
    def passes(self) -> int:
        """Transformer passes of a clip."""
        return len(self.sigmas) * self.passes_each

    def noise(
        self, keys: Sequence[tuple[str, int]], shape: Sequence[int], place: int
    ) -> torch.Tensor:
        """(B, C, T, H, W) fp32 for clips (key of the source, ordinal): no other clip, no batch and
        no machine enters."""
        rows = [
            torch.from_numpy(
                counted_rng(self.seed, _NOISE, key, ordinal, place).standard_normal(
                    tuple(shape), dtype="float32"
                )
            )
            for key, ordinal in keys
        ]
        return torch.stack(rows)

    def path(
        self,
        roles: Roles,
        batch: Batch,
        keys: Sequence[tuple[str, int]],
        negative: torch.Tensor,
        x_t: torch.Tensor,
        first: int,
    ) -> Generator[torch.Tensor, None, None]:
        """x_t at each level from `first` on, then the clip: `trajectory` with guidance."""

        def predict(x_t: torch.Tensor, timestep: torch.Tensor, place: int) -> torch.Tensor:
            return guided_velocity(
                roles, x_t, timestep, batch, negative, self.guidance, batched=self.batched_guidance
            )

        def fresh_noise(place: int) -> torch.Tensor:
            return self.noise(keys, x_t.shape[1:], place).to(x_t.device)

        return trajectory(
            batch, self.sigmas, x_t, predict, fresh_noise,
            renoise=self.pairing == "renoise", first=first,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Its part of a fingerprint's `synthesis`, but what the options say as they are."""
        return {
            "guidance": float(self.guidance),
            "seed": self.seed,
            "states": {"timesteps": list(self.timesteps)} if self.states else None,
        }

    def describe(self) -> str:
        """In words."""
        whose = ", ".join(f"{len(places)} of {expert}" for expert, places in self.experts)
        guidance = "no guidance" if self.passes_each == 1 else f"CFG {self.guidance:g}"
        stored = ", ".join(f"{t:.1f}" for t in self.timesteps)
        return f"{len(self.sigmas)} steps ({whose}), {guidance}: {self.passes} passes a clip" + (
            f"; states at {stored}" if stored else ""
        )


def sampler_of(config: SynthesizeConfig, spec: ModelSpec) -> tuple[Sampler, dict[str, Any]]:
    """The sampler that the options ask for, and what a fingerprint's `synthesis` says of it."""
    shift = spec.flow_shift if config.flow_shift is None else config.flow_shift
    if config.step_list is not None:
        pairing: Pairing = config.pairing or "renoise"
        indices = step_indices(config.step_list, "--step-list")
        sigmas = Schedule(indices=indices, shift=shift, boundary=spec.boundary).sigmas
        states = tuple(range(len(sigmas)))
        said: dict[str, Any] = {"steps": len(sigmas), "step_list": [1000 * s for s in sigmas]}
    else:
        pairing = "euler"
        steps = STEPS if config.steps is None else config.steps
        sigmas, states = even_levels(steps, shift), ()
        if config.states is not None:
            student = shift if config.student_shift is None else config.student_shift
            indices = step_indices(config.states, "--states")
            wanted = Schedule(indices=indices, shift=student, boundary=spec.boundary).sigmas
            sigmas, states = with_states(sigmas, wanted)
        said = {"steps": steps, "step_list": None}
    sampler = Sampler(
        sigmas=sigmas,
        states=states,
        boundary=spec.boundary if spec.two_experts else None,
        guidance=config.guidance,
        batched_guidance=config.batched_guidance,
        pairing=pairing,
        seed=config.seed,
    )
    return sampler, said | {"flow_shift": float(shift), "pairing": pairing} | sampler.identity()


def with_states(
    sigmas: Sequence[float], wanted: Sequence[float]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The falling levels with those `wanted` among them, and where these are.

    A level that is there already, but for rounding, is taken as it is wanted.
    """
    kept = [s for s in sigmas if all(abs(s - other) > _SAME_LEVEL for other in wanted)]
    every = sorted([*kept, *wanted], reverse=True)
    return tuple(every), tuple(every.index(sigma) for sigma in wanted)


@dataclass(frozen=True, kw_only=True)
class ClipCost:
    """What a clip costs by the defaults of `wantrain synthesize`."""

    clip_passes: int
    """Of the transformer."""
    clip_bytes: int
    """Of its latents in bf16; of each stored state as many."""

    def line(self) -> str:
        """For people."""
        return (
            f"clips    {self.clip_passes} transformer passes each ({STEPS} steps with CFG; 2 more "
            f"for each of --states that is no step anyway), {self.clip_bytes / 1e6:.1f} MB of "
            "latents, and as much for each state"
        )


def clip_cost(spec: ModelSpec, bucket: Bucket) -> ClipCost:
    """Of a clip of this shape."""
    numbers = prod(bucket.latent_shape(spec.latent_channels, spec.stride))
    return ClipCost(clip_passes=2 * STEPS, clip_bytes=numbers * torch.bfloat16.itemsize)
