"""Validation clips of both experts together, by their LoRA files, when both are trained.

They are what `wantrain sample` makes with the two files, the same prompt and seed, but from the
cached prompts: neither text encoder nor VAE is loaded, and one expert at a time. Those of plain
LoRAs take validation's steps and guidance, not the base model's sampler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from shared.cli import support
from shared.interrupt import Interrupted, catch_signals
from shared.io.hashing import sha256_of
from train.config import TrainConfig
from train.data.batches import StoredBatch, load_prompt_bank
from train.functional.rng import clip_generator
from train.functional.schedule import even_levels, steps_by_expert
from train.loop import validation_of
from train.memory.forward_only import loaded
from train.memory.options import MemoryOptions
from train.methods.finetune import VALIDATION_GUIDANCE, VALIDATION_STEPS
from train.methods.flow_matching import guided_velocity, trajectory
from train.model.lora_files import read_lora
from train.model.lora_init import start_from
from train.model.roles import Roles
from train.options import Expert
from train.out_of_memory import explained
from train.run import Run
from train.saving.export import lora_path
from train.saving.provenance import read_provenance
from train.session import lora_of, settle_rounding
from train.tracking.validation import FOLDER, Validation, read_records

_LORA = "lora"  # the one role


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the two experts make a clip together."""

    sigmas: Sequence[float]
    """Falling, float64; behind the last is the clip, at 0."""
    steps: Mapping[Expert, range]
    """Places in `sigmas` of each expert, in the order of their work."""
    guidance: float
    renoise: bool


@dataclass(kw_only=True)
class _Clip:
    """One that is being made."""

    batch: StoredBatch
    generator: torch.Generator
    x_t: torch.Tensor
    """(1, C, T, h, w) fp32 on the CPU, at the level of the next step."""

    def noise(self) -> torch.Tensor:
        """The next of its noise, drawn as the pipelines draw it."""
        return torch.randn(self.x_t.shape, generator=self.generator)


def joint_validation(config: TrainConfig, runs: Sequence[Run]) -> Validation | None:
    """What both experts sample together, where a run of `config` validates.

    `runs`: the high-noise expert's, then the low-noise one's.
    """
    validation = validation_of(runs[0])  # an expert that begins with noise: of the prompts
    return None if validation is None else replace(validation, folder=config.output_dir / FOLDER)


def describe(validation: Validation, runs: Sequence[Run]) -> str:
    """A line for people."""
    folder = validation.folder_of(runs[-1].steps)
    return f"validate both experts together: {len(validation.inputs)} clips, into {folder}"


def validate_jointly(config: TrainConfig, runs: Sequence[Run], console: Console) -> int | None:
    """Make the clips of complete runs unless they are there; a signal's number if it ended that.

    One process calls it.
    """
    validation = joint_validation(config, runs)
    if validation is None:
        return None
    number = runs[-1].steps
    records = _records(validation, runs, number)
    there = read_records(validation.folder_of(number)) == records
    support.say(console, describe(validation, runs) + (", are there" if there else ""))
    if there:
        return None
    with catch_signals("stopping: the clips of both experts are not made ...") as signals:
        try:
            with explained(runs[-1]):
                made = _sampled(validation, runs, console)
            with signals.deferred():
                validation.write(made, records, number=number)
        except Interrupted as stopped:
            return stopped.signum
    return None


def _records(validation: Validation, runs: Sequence[Run], number: int) -> list[dict[str, Any]]:
    """What tells these clips from those of other prompts, seeds or LoRAs."""
    loras = {run.objective.expert: sha256_of(_file_of(run)) for run in runs}
    seed = runs[0].config.seed
    return [
        {**record, "key": one.batch.keys[0], "seed": seed + one.seed, "loras": loras}
        for one, record in zip(validation.inputs, validation.records(number), strict=True)
    ]


def _file_of(run: Run) -> Path:
    return lora_path(run.config.output_dir, run.objective.expert, "diffusers")


def sampling_of(runs: Sequence[Run]) -> Sampling:
    """By what their LoRA files say, as `wantrain sample` does it."""
    how = read_provenance(_file_of(runs[0]))
    student = how.method == "distill"
    sigmas = how.schedule.sigmas if student else even_levels(VALIDATION_STEPS, how.flow_shift)
    return Sampling(
        sigmas=sigmas,
        steps=steps_by_expert(sigmas, how.boundary),
        guidance=1.0 if student else VALIDATION_GUIDANCE,
        renoise=how.pairing == "renoise",
    )


def _sampled(validation: Validation, runs: Sequence[Run], console: Console) -> list[torch.Tensor]:
    """Latents (C, T, h, w) of each input, on the CPU."""
    config, device = runs[0].config, torch.device(runs[0].device)
    settle_rounding(config)
    sampling = sampling_of(runs)
    clips = [_begun(one.batch, config.seed + one.seed, one.label) for one in validation.inputs]
    say = partial(support.say, console)
    for expert, places in sampling.steps.items():
        (run,) = (run for run in runs if run.objective.expert == expert)
        negative = load_prompt_bank(run.data.first, run.spec.family).negative.to(device)
        memory, attention = _memory(run.config), run.config.attention_backend
        with_lora = partial(_with_lora, run)
        with (
            loaded(run.spec, expert, run.base, memory, attention, device, say, with_lora) as roles,
            roles.role(_LORA),
        ):
            for clip in clips:
                clip.x_t = _walked(sampling, places, clip, negative, roles).cpu()
    return [clip.x_t[0] for clip in clips]


def _begun(batch: StoredBatch, seed: int, prompt: str) -> _Clip:
    clip = _Clip(
        batch=batch,
        generator=clip_generator(seed, prompt),
        x_t=torch.empty(batch.latents.shape),
    )
    clip.x_t = clip.noise()
    return clip


def _memory(config: TrainConfig) -> MemoryOptions:
    """A run's, for one process: what a strategy sharded may be too large for it, and streams."""
    return MemoryOptions(
        strategy="single",
        mixed_precision=config.mixed_precision,
        base_precision=config.base_precision,
        low_vram=config.low_vram or config.shards_base,
        blocks_to_swap=config.blocks_to_swap,
    )


def _with_lora(run: Run, transformer: nn.Module) -> Roles:
    """The transformer with the run's LoRA as its file has it."""
    lora = lora_of(run.config, transformer)
    roles = Roles(transformer, lora, seed=0, names=(_LORA,), fused=run.config.fused_lora)
    start_from(read_lora(_file_of(run)), roles.parameters(_LORA), lora)
    return roles


def _walked(
    sampling: Sampling, places: range, clip: _Clip, negative: torch.Tensor, roles: Roles
) -> torch.Tensor:
    """A clip after an expert's steps."""
    device = negative.device
    batch = clip.batch.to(device)

    def predict(x_t: torch.Tensor, timestep: torch.Tensor, _: int) -> torch.Tensor:
        return guided_velocity(roles, x_t, timestep, batch, negative, sampling.guidance)

    path = trajectory(
        batch,
        sampling.sigmas,
        clip.x_t.to(device),
        predict,
        lambda _: clip.noise().to(device),
        renoise=sampling.renoise,
        first=places.start,
    )
    return next(islice(path, len(places), None))
