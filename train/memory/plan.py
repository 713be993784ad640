"""What `wantrain plan` answers: the memory of one set of options, and of those that need less."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from shared.cli.checks import WHOLE, check_option
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.models.family import Mode
from shared.models.original_layout import is_original
from shared.models.spec import ModelSpec, read_model_spec, resolve_model
from shared.models.wan import PUBLISHED, published_model, write_configs
from train.memory.estimate import Estimate, Settings, estimate_of, tokens_of
from train.memory.options import MemoryOptions
from train.model.custom_weights import empty_transformer

_GIB = 2**30
# What is no tensor: CUDA's context and libraries; and what torch reserves over what it allocates,
# with `expandable_segments` (simulated: 1.03; 1.08 without).
CONTEXT, FRAGMENTS = int(0.7 * _GIB), 1.03


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One set of options and its memory."""

    options: tuple[str, ...]
    """What is changed; none: as asked."""
    estimate: Estimate

    @property
    def name(self) -> str:
        return " ".join(self.options) or "as asked"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What was asked first, then what may be changed, the least costly in speed first."""

    model: str
    bucket: Bucket
    settings: Settings
    spec: ModelSpec
    tokens: int
    choices: tuple[Choice, ...]

    def fitting(self, gpu_memory: float) -> Choice | None:
        """The first that fits a GPU of so many GiB; None: none does."""
        return first_that_fits(self.choices, gpu_memory * _GIB)

    def to_json(self, gpu_memory: float | None) -> dict[str, Any]:
        """In bytes."""
        fits = None if gpu_memory is None else self.fitting(gpu_memory)
        return {
            "model": self.model,
            "bucket": str(self.bucket),
            "tokens": self.tokens,
            "parts": self.choices[0].estimate.parts,
            "choices": [
                {"options": one.options, "total": one.estimate.total, "host": one.estimate.host}
                for one in self.choices
            ],
            "fits": None if fits is None else fits.options,
        }

    def lines(self, gpu_memory: float | None) -> list[str]:
        """What people read."""
        asked, first = self.settings, self.choices[0].estimate
        number = "" if asked.processes == 1 else f", each of {asked.processes} processes"
        trained = f"rank {asked.rank}, " if asked.roles else ""
        lines = [
            f"model    {self.model} ({self.spec.mode}), clips of {self.bucket}: {self.tokens} "
            f"tokens; {trained}batch {asked.samples}, {asked.memory.strategy}{number}",
            *(f"  {name:16}{part / _GIB:8.2f} GiB" for name, part in first.parts.items() if part),
            f"  {'in all':16}{first.total / _GIB:8.2f} GiB"
            + (f", and {first.host / _GIB:.2f} GiB of CPU memory" if first.host else ""),
            "",
            f"{'options':52}{'GPU GiB':>8}{'CPU GiB':>9}",
        ]
        for one in self.choices:
            fits = gpu_memory is not None and one is self.fitting(gpu_memory)
            lines.append(
                f"{one.name:52}{one.estimate.total / _GIB:8.1f}{one.estimate.host / _GIB:9.1f}"
                + ("  <- fits" if fits else "")
            )
        if gpu_memory is not None and self.fitting(gpu_memory) is None:
            lines.append(
                f"none fits {gpu_memory:g} GiB, with {FRAGMENTS - 1:.0%} for fragments and "
                f"{CONTEXT / _GIB:.1f} GiB for CUDA itself: fewer frames or smaller clips would"
            )
        return lines


def plan_memory(model: str, bucket: Bucket, settings: Settings) -> MemoryPlan:
    """Of a published model by its name, or of a folder. UserError where there is none, and for what
    a run would refuse."""
    for name, found in (("rank", settings.rank), ("train_batch_size", settings.samples)):
        check_option(name, found, found >= 1, WHOLE)
    frames = bucket.frames
    check_option("video_sample_n_frames", frames, frames % 4 == 1, "1, 5, 9 and so on")
    published = published_model(model)
    if published is not None and not Path(model).is_dir():
        with tempfile.TemporaryDirectory() as folder:
            write_configs(published, Path(folder))
            return _planned(model, read_model_spec(Path(folder)), bucket, settings)
    try:
        folder_of_it = resolve_model(model, [])
    except UserError as error:
        raise UserError(f"{error} Built in are: {', '.join(PUBLISHED)}.") from error
    if is_original(folder_of_it):
        raise UserError(
            f"model: {model} is in Wan's original layout, which this can't read. Use the "
            f"published configs: --model with one of {', '.join(PUBLISHED)}"
        )
    return _planned(model, read_model_spec(folder_of_it), bucket, settings)


def _planned(model: str, spec: ModelSpec, bucket: Bucket, settings: Settings) -> MemoryPlan:
    height, width, multiple = bucket.height, bucket.width, spec.side_multiple
    fine = not (height % multiple or width % multiple) and height * width > 0
    expected = f"multiples of {multiple} for this model"
    check_option("fix_sample_size", f"{height} {width}", fine, expected)
    transformer = empty_transformer(spec, spec.expert_folders[-1])
    tokens = tokens_of(bucket.latent_shape(spec.latent_channels, spec.stride)[1:], spec)
    choices = choices_of(transformer, spec.mode, tokens, settings)
    return MemoryPlan(
        model=model, bucket=bucket, settings=settings, spec=spec, tokens=tokens, choices=choices
    )


def choices_of(
    transformer: nn.Module, mode: Mode, tokens: int, settings: Settings
) -> tuple[Choice, ...]:
    """As asked, then what may be changed, the least costly in speed first."""
    return tuple(
        Choice(
            options=options,
            estimate=estimate_of(transformer, mode, tokens, replace(settings, memory=memory)),
        )
        for options, memory in _alternatives(settings)
    )


def first_that_fits(choices: Iterable[Choice], room: float) -> Choice | None:
    """The first that fits a card of `room` bytes, with torch's fragments and CUDA's context."""
    most = (room - CONTEXT) / FRAGMENTS
    return next((one for one in choices if one.estimate.total <= most), None)


def _alternatives(settings: Settings) -> list[tuple[tuple[str, ...], MemoryOptions]]:
    """What was asked, and what would need less, by what it costs in speed."""
    asked = settings.memory
    plain = replace(
        asked,
        gradient_checkpointing=True,
        low_vram=False,
        blocks_to_swap=None,
        activation_offloading=False,
        keep_attention=False,
    )
    offloading: dict[str, Any] = {"activation_offloading": True}
    less: list[tuple[str, dict[str, Any]]] = [
        ("--base-precision int8", {"base_precision": "int8"}),
        ("--base-precision nf4", {"base_precision": "nf4"}),
        ("--low-vram", {"low_vram": True}),
    ]
    if not settings.roles:
        only = [((option,), replace(asked, **change)) for option, change in less]
        return [((), asked), *(pair for pair in only if pair[1] != asked)]
    found: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("--no-gradient-checkpointing",), {"gradient_checkpointing": False}),
        (("--gradient-checkpointing",), {}),
        (("--activation-offloading",), offloading),
    ]
    if not asked.shards_moments and asked.optimizer == "adamw":
        found.append((("--use-8bit-adam",), {"use_8bit_adam": True}))
    if not asked.shards_base:
        fsdp = {"strategy": "fsdp", "base_precision": None, "use_8bit_adam": False}
        sharded: list[tuple[str, dict[str, Any]]] = [("--strategy fsdp", fsdp)]
        for option, change in [
            *(sharded if settings.processes > 1 and asked.optimizer == "adamw" else []),
            *less,
        ]:
            found.append(((option,), change))
            found.append(((option, "--activation-offloading"), change | offloading))
    others = [(options, replace(plain, **changed)) for options, changed in found]
    return [((), asked), *(pair for pair in others if pair[1] != asked)]
