"""Updates of the published models on fake tensors: which there are, and how one is run."""

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from benchmarks.plan_peaks import TARGETS, recipe_of
from shared.models.spec import ModelSpec, blocks_of, read_model_spec
from shared.models.wan import CLIP_DIM, PUBLISHED, UMT5_DIM, PublishedModel, write_configs
from tests.fake_cuda.machine import CUDA, fake_gpu
from tests.fake_cuda.watch import Watch
from train.data.batches import StoredBatch
from train.distributed.process_group import SINGLE
from train.memory.activation_offload import ActivationOffloading
from train.memory.options import MemoryOptions
from train.memory.quantize import quantise
from train.methods import finetune
from train.methods.base import Objective
from train.methods.distillation import Distillation
from train.methods.dmd import exit_step
from train.methods.finetune import LORA, Finetuning
from train.methods.flow_matching import NoiseLevels
from train.model.attention import NATIVE, use_attention
from train.model.base import keep_from_autocast
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles
from train.optim import adamw8bit
from train.optim.ema import Ema
from train.optim.optimizers import OptimizerSettings
from train.strategies.spread import spread

Method = Literal["distill", "lora"]
MODELS = (
    "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b-480p", "wan2.2-t2v-a14b",
    "wan2.2-i2v-a14b", "wan2.2-ti2v-5b",
)  # fmt: skip
EVERY_OPTION = "wan2.2-i2v-a14b"
"""The model whose options are in the short suite, but for one that is like `low vram`."""
RANK = 64
ADAM = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


@dataclass(frozen=True, kw_only=True)
class Option:
    """What differs from a run with the defaults."""

    memory: MemoryOptions = field(default_factory=MemoryOptions)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    blocks: int = 1
    method: Method = "distill"


def _memory(**options: Any) -> Option:
    return Option(memory=MemoryOptions(**options))


PLAIN, PLAIN_LORA, SLOWEST = "distill", "lora", "blocks to swap"
OPTIONS: Mapping[str, Option] = {
    PLAIN: Option(),
    PLAIN_LORA: Option(method="lora"),
    "no checkpointing": _memory(gradient_checkpointing=False),
    "activation offloading": replace(_memory(activation_offloading=True), blocks=2),
    # More than there are buffers, so that blocks take one another's place.
    "low vram": replace(_memory(low_vram=True), blocks=3),
    SLOWEST: replace(_memory(blocks_to_swap=3), blocks=4),
    "int8": _memory(base_precision="int8"),
    "fp8": _memory(base_precision="fp8"),
    "nf4": _memory(base_precision="nf4"),
    "8-bit Adam": _memory(use_8bit_adam=True),
    "all for memory": replace(
        _memory(base_precision="int8", low_vram=True, activation_offloading=True),
        blocks=3,
    ),
    "batched guidance": Option(recipe={"batched_guidance": True, "fake_guidance_scale": 2.0}),
    "flow matching beside": Option(recipe={"fm_loss_weight": 0.5}),
    "seed": Option(recipe={"maths": "seed", "pairing": "euler"}),
    "high": Option(recipe={"expert": "high", "start": "noise"}),
}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of one step of one role."""

    tflop: float
    """Of a block, forward, computed again and backward."""
    written_gb: float
    """Bytes of all new tensors of a block."""
    peak_gb: float
    """Most bytes alive on the device, all in all."""
    copies_in: int
    """From the CPU to the device, without waiting."""
    copies_out: int


@dataclass(kw_only=True)
class Found:
    """What a case shows; see `Watch` and `fake_gpu` for what is counted."""

    steps: dict[str, Numbers] = field(default_factory=dict)
    waits: Counter[str] = field(default_factory=Counter)
    wide: Counter[str] = field(default_factory=Counter)
    operands: Counter[str] = field(default_factory=Counter)
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """A model with an option."""

    model: str
    option: str

    @property
    def name(self) -> str:
        return f"{self.model}: {self.option}"


def cases(models: Sequence[str]) -> list[Case]:
    """Every option of these models."""
    return [
        Case(model, name)
        for model in models
        for name, option in OPTIONS.items()
        if option.recipe.get("expert") != "high" or PUBLISHED[model].two_experts
    ]


def short_cases() -> list[Case]:
    """Defaults of all models, and nearly every option of one."""
    return [
        case
        for case in cases(MODELS)
        if case.option in (PLAIN, PLAIN_LORA)
        or (case.model == EVERY_OPTION and case.option != SLOWEST)
    ]


def run_case(case: Case) -> Found:
    """All steps of a case, each measured by itself.

    What torch raises of mixed devices and of values that fakes don't have becomes `error`.
    """
    found, option = Found(), OPTIONS[case.option]
    published = PUBLISHED[case.model]
    spec = _spec(published)
    objective = _objective(spec, option)  # computes with values
    with ExitStack() as held:
        held.enter_context(mock.patch.object(finetune, "VALIDATION_STEPS", 2))
        adamw8bit._map.cache_clear()  # of another case's fakes
        found.operands = held.enter_context(fake_gpu())
        try:
            _steps(_Setup.of(published, spec, objective, option), found)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            found.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


@dataclass(frozen=True, kw_only=True)
class _Setup:
    spec: ModelSpec
    roles: Roles
    trained: Mapping[str, Any]
    objective: Objective
    watch: Watch
    blocks: int
    validates: bool

    @classmethod
    def of(
        cls, published: PublishedModel, spec: ModelSpec, objective: Objective, option: Option
    ) -> "_Setup":
        """As `train.session.open_session` has it, but for weights that are read."""
        config = published.transformer_config() | {"num_layers": option.blocks}
        transformer = spec.family.load_class("transformer").from_config(config)
        kept = set(transformer._keep_in_fp32_modules)
        for name, parameter in transformer.named_parameters():
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.bfloat16()
        memory = option.memory
        if memory.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        keep_from_autocast(transformer, CUDA)
        use_attention(transformer, NATIVE)
        targets = select_targets(transformer, TARGETS)
        rates = objective.learning_rates
        lora = LoraSpec(rank=RANK, alpha=32, targets=targets)
        roles = Roles(transformer, lora, seed=1, names=rates)
        quantise(transformer, memory.base_precision, CUDA)
        strategy = spread(
            "single", roles, rates, replace(ADAM, name=memory.chosen_optimizer), ranks=SINGLE,
            device=CUDA, streamed=memory.streamed(option.blocks), accumulation=1, max_norm=1.0,
        )  # fmt: skip
        if memory.activation_offloading:
            transformer.enable_gradient_checkpointing(ActivationOffloading(CUDA).checkpoint)
        frames, height, width = _grid(spec)
        watch = Watch(frames * (height // 2) * (width // 2) * published.heads * 128)
        watch.see_blocks(blocks_of(transformer))
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            watch.see(tensor)
        return cls(
            spec=spec,
            roles=roles,
            trained=strategy.trained,
            objective=objective,
            watch=watch,
            blocks=option.blocks,
            validates=option in (OPTIONS[PLAIN], OPTIONS[PLAIN_LORA]),
        )


def _spec(published: PublishedModel) -> ModelSpec:
    with tempfile.TemporaryDirectory() as folder:
        write_configs(published, Path(folder))
        return read_model_spec(Path(folder))


def _grid(spec: ModelSpec) -> tuple[int, int, int]:
    """Of latents, (T, H, W): 832x480x81, of ti2v 1280x704x121."""
    return (31, 44, 80) if spec.mode == "ti2v" else (21, 60, 104)


def _objective(spec: ModelSpec, option: Option) -> Objective:
    recipe = replace(recipe_of(spec), **option.recipe)
    if option.method == "distill":
        return Distillation(
            recipe=recipe,
            gen_update_interval=1,
            uniform_sampling=True,
            learning_rates={GENERATOR: 1e-5, CRITIC: 1e-5},
        )
    levels = NoiseLevels(
        expert=recipe.expert,
        shift=recipe.schedule.shift,
        boundary=spec.boundary,
        sampling="logit-normal",
        mean=0.0,
        std=1.0,
    )
    return Finetuning(
        levels=levels, uniform_sampling=True, strata=1, learning_rates={LORA: 1e-4}, seed=1
    )


def _batch(spec: ModelSpec, update: int) -> StoredBatch:
    """As the loader hands it over: one sample, in bf16, on the CPU."""
    grid, dtype = _grid(spec), torch.bfloat16
    latents = torch.zeros(1, spec.latent_channels, *grid, dtype=dtype)
    return StoredBatch(
        family=spec.family,
        given=spec.given_frames,
        update=update,
        samples=(0,),
        keys=("key",),
        latents=latents,
        texts=(torch.zeros(77, UMT5_DIM, dtype=dtype),),
        condition=torch.zeros_like(latents) if spec.given_frames else None,
        image=None if spec.image_dim is None else torch.zeros(1, 257, CLIP_DIM, dtype=dtype),
        noised=torch.ones(1, 1, grid[0], 1, 1) if spec.mode == "ti2v" else None,
    )


def _update_of_two_passes(objective: Objective) -> int:
    """Number of an update whose rollout ends at its second step."""
    if not isinstance(objective, Distillation):
        return 0
    recipe = objective.recipe
    return next(u for u in range(1000) if exit_step(recipe, u) == recipe.walk[1])


def _steps(setup: _Setup, found: Found) -> None:
    """An update of each role, as in `train.loop`, and of plain runs a validation clip."""
    objective, roles, watch, trained = setup.objective, setup.roles, setup.watch, setup.trained
    found.waits, found.wide = watch.waits, watch.wide
    negative = torch.zeros(setup.spec.family.text_tokens, UMT5_DIM, dtype=torch.bfloat16).to(CUDA)
    stored = _batch(setup.spec, _update_of_two_passes(objective))
    main = objective.main_role

    def update(role: str) -> None:
        step = objective.loss(roles, role, stored.to(CUDA), negative)
        with roles.role(role):
            step.loss.backward()
        step.numbers()
        trained[role].update(1e-5, 1.0)
        if role == main:
            ema.update(trained[role].weights(), 1)

    def validate(_: str) -> None:
        objective.sample(roles, stored.to(CUDA), negative)

    steps: dict[str, Callable[[str], None]] = dict.fromkeys(objective.learning_rates, update)
    if setup.validates:
        steps["validation"] = validate
    with watch:
        watch.see(negative)
        for role in trained:  # moments are there from the second update on
            for parameter in roles.parameters(role).values():
                parameter.grad = torch.zeros_like(parameter)
            trained[role].update(1e-5, 1.0)
        ema = Ema.of(main, trained[main].weights(), decay=0.99, start=0)
        watch.waits.clear()
        for name, step in steps.items():
            watch.flops = watch.written = 0
            watch.peak = watch.now
            watch.moved.clear()
            step(name)
            found.steps[name] = Numbers(
                tflop=round(watch.flops / setup.blocks / 1e12, 3),
                written_gb=round(watch.written / setup.blocks / 1e9, 3),
                peak_gb=round(watch.peak / 1e9, 3),
                copies_in=watch.moved["to the device"],
                copies_out=watch.moved["to the CPU"],
            )
