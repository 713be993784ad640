"""What `wantrain plan` answers: the memory of one set of options, and of those that need less."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from shared.buckets import Bucket
from shared.errors import UserError
from shared.model_spec import ModelSpec, read_model_spec, resolve_model
from shared.original_layout import is_original
from shared.published_models import PUBLISHED, published_model, write_configs
from train.base import Precision
from train.lora import select_targets
from train.memory import Estimate, Settings, estimate_of, tokens_of
from train.own_transformer import empty_transformer
from train.quantised import BasePrecision, is_quantised
from train.strategy import CUTTING, StrategyName
from train.streaming import BUFFERS

_GIB = 2**30
LEFT_FREE = 1.5  # GiB of a GPU for what is no tensor: CUDA's context, libraries, fragments


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options, as they are called on the command line. Raises UserError for what a run would
    refuse, too."""

    model: str
    bucket: Bucket
    roles: int
    rank: int
    target_name: tuple[str, ...]
    average: bool
    samples: int
    precision: Precision
    stored: BasePrecision | None
    checkpointing: bool
    low_vram: bool
    blocks_to_swap: int | None
    activation_offloading: bool
    use_8bit_adam: bool
    strategy: StrategyName
    processes: int

    def __post_init__(self) -> None:
        for name, found in (("rank", self.rank), ("train-batch-size", self.samples)):
            if found < 1:
                raise UserError(f"--{name}: found {found}, expected a whole number from 1 on.")
        if self.bucket.frames % 4 != 1:
            raise UserError(
                f"--video-sample-n-frames: found {self.bucket.frames}, expected 1, 5, 9 and so on."
            )
        if self.strategy == "single" and self.processes > 1:
            raise UserError(
                f"--strategy: found single with --num-processes {self.processes}. Use ddp, or "
                "leave it out."
            )
        waits = self.low_vram or self.blocks_to_swap is not None or self.activation_offloading
        if waits and not self.checkpointing:
            raise UserError(
                "--no-gradient-checkpointing: found with --low-vram, --blocks-to-swap or "
                "--activation-offloading, which need it. Leave out one of the two."
            )
        swapped = self.blocks_to_swap
        if swapped is not None and (swapped <= BUFFERS or self.strategy in CUTTING):
            raise UserError(
                f"--blocks-to-swap: found {swapped} with --strategy {self.strategy}; expected "
                f"{BUFFERS + 1} or more, and a strategy that does not cut the base."
            )

        if self.use_8bit_adam and self.strategy not in ("single", "ddp"):
            raise UserError(
                f"--use-8bit-adam: found with --strategy {self.strategy}; it is for single and ddp."
            )
        if is_quantised(self.stored) and self.strategy in CUTTING:
            raise UserError(
                f"--base-precision: found {self.stored} with --strategy {self.strategy}, which "
                "cuts weights as they are. Use --strategy ddp or zero2, or leave it out."
            )

    def swapped(self, layers: int) -> int:
        """Blocks that live in CPU memory."""
        if self.strategy in CUTTING:
            return 0
        if self.blocks_to_swap is not None:
            if self.blocks_to_swap > layers:
                raise UserError(
                    f"--blocks-to-swap: found {self.blocks_to_swap}, expected at most {layers}, "
                    "which this model has."
                )
            return self.blocks_to_swap
        return layers if self.low_vram else 0


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

    asked: Asked
    spec: ModelSpec
    tokens: int
    choices: tuple[Choice, ...]

    def fitting(self, gpu_memory: float) -> Choice | None:
        """The first that fits a GPU of so many GiB; None: none does."""
        room = (gpu_memory - LEFT_FREE) * _GIB
        return next((one for one in self.choices if one.estimate.total <= room), None)

    def to_json(self, gpu_memory: float | None) -> dict[str, Any]:
        """In bytes."""
        fits = None if gpu_memory is None else self.fitting(gpu_memory)
        return {
            "model": self.asked.model,
            "bucket": str(self.asked.bucket),
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
        asked, first = self.asked, self.choices[0].estimate
        number = "" if asked.processes == 1 else f", each of {asked.processes} processes"
        lines = [
            f"model    {asked.model} ({self.spec.mode}), clips of {asked.bucket}: {self.tokens} "
            f"tokens; rank {asked.rank}, batch {asked.samples}, {asked.strategy}{number}",
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
                f"none fits {gpu_memory:g} GiB with {LEFT_FREE:g} GiB left free: fewer frames or "
                "smaller clips would"
            )
        return lines


def plan_memory(asked: Asked) -> MemoryPlan:
    """Of a published model by its name, or of a folder. UserError where there is none, and for what
    a run would refuse."""
    published = published_model(asked.model)
    if published is not None and not Path(asked.model).is_dir():
        with tempfile.TemporaryDirectory() as folder:
            write_configs(published, Path(folder))
            return _planned(asked, read_model_spec(Path(folder)))
    try:
        folder_of_it = resolve_model(asked.model, [])
    except UserError as error:
        raise UserError(f"{error} Built in are: {', '.join(PUBLISHED)}.") from error
    if is_original(folder_of_it):
        raise UserError(
            f"model: {asked.model} is in Wan's original layout, which this can't read. Use the "
            f"published configs: --model with one of {', '.join(PUBLISHED)}"
        )
    return _planned(asked, read_model_spec(folder_of_it))


def _planned(asked: Asked, spec: ModelSpec) -> MemoryPlan:
    bucket, multiple = asked.bucket, spec.side_multiple
    if bucket.height % multiple or bucket.width % multiple or not bucket.height * bucket.width:
        raise UserError(
            f"--fix-sample-size: found {bucket.height} {bucket.width}, expected multiples of "
            f"{multiple} for this model."
        )
    transformer = empty_transformer(spec, spec.expert_folders[-1])
    tokens = tokens_of(bucket.latent_shape(spec.latent_channels, spec.stride)[1:], spec)
    choices = tuple(
        Choice(
            options=options,
            estimate=estimate_of(transformer, spec.mode, tokens, settings_of(one, transformer)),
        )
        for options, one in _alternatives(asked)
    )
    return MemoryPlan(asked=asked, spec=spec, tokens=tokens, choices=choices)


def settings_of(asked: Asked, transformer: nn.Module) -> Settings:
    """The same for `train.memory`."""
    return Settings(
        samples=asked.samples,
        rank=asked.rank,
        targets=select_targets(transformer, asked.target_name),
        roles=asked.roles,
        average=asked.average,
        precision=asked.precision,
        stored=asked.stored,
        checkpointing=asked.checkpointing,
        strategy=asked.strategy,
        processes=asked.processes,
        swapped=asked.swapped(len(transformer.blocks)),  # type: ignore[arg-type]
        activation_offloading=asked.activation_offloading,
        use_8bit_adam=asked.use_8bit_adam,
    )


def _alternatives(asked: Asked) -> list[tuple[tuple[str, ...], Asked]]:
    """What was asked, and with what would need less, by what it costs in speed."""
    plain = replace(
        asked, checkpointing=True, low_vram=False, blocks_to_swap=None, activation_offloading=False
    )
    cut = asked.strategy in CUTTING
    levers: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("--no-gradient-checkpointing",), {"checkpointing": False}),
        (("--gradient-checkpointing",), {}),
        (("--activation-offloading",), {"activation_offloading": True}),
    ]
    if asked.strategy in ("single", "ddp"):
        levers.append((("--use-8bit-adam",), {"use_8bit_adam": True}))
    if not cut and asked.processes > 1:
        fsdp: dict[str, Any] = {"strategy": "fsdp", "stored": None, "use_8bit_adam": False}
        levers.append((("--strategy fsdp",), fsdp))
        both = fsdp | {"activation_offloading": True}
        levers.append((("--strategy fsdp", "--activation-offloading"), both))
    if not cut:
        for stored in ("int8", "nf4"):
            less: dict[str, Any] = {"stored": stored}
            both = less | {"activation_offloading": True}
            levers.append(((f"--base-precision {stored}",), less))
            levers.append(((f"--base-precision {stored}", "--activation-offloading"), both))
        both = {"low_vram": True, "activation_offloading": True}
        levers.append((("--low-vram",), {"low_vram": True}))
        levers.append((("--low-vram", "--activation-offloading"), both))
    others = [(options, replace(plain, **changed)) for options, changed in levers]
    return [((), asked), *(pair for pair in others if pair[1] != asked)]
