"""`wantrain sample`: a pipeline of its own, LoRAs, and exactly the trained steps.

The only module of this stage that builds a VAE and a text encoder, in a process of its own.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from shared.cli import support
from shared.cli.checks import check_writable
from shared.device import chosen_device, take_device
from shared.errors import UserError
from shared.format.resize import fit_to
from shared.format.schema import DTYPES
from shared.io.durable import write_json
from shared.io.mp4 import Clip, write_mp4
from shared.models import weights
from shared.models.family import Family
from shared.models.processors import load_image_processor, load_tokenizer
from shared.models.spec import TIMESTEPS, ModelSpec, blocks_of, read_model_spec, resolve_model
from train.functional.rng import counted_rng
from train.functional.schedule import Schedule
from train.memory.block_offload import StreamedBlocks, streaming_line
from train.memory.quantize import check_installed, quantise
from train.model.base import Base, base_digest, component_of, load_weights, merge
from train.model.lora_files import LoraFile, check_fits_model, read_lora
from train.model.peft_config import PEFT_METADATA_KEY
from train.options import Pairing
from train.sampling.config import SampleConfig
from train.sampling.contact_sheet import contact_sheet
from train.saving.lora_formats import DIFFUSERS_PREFIX, to_form
from train.saving.provenance import Provenance, check_expert, read_provenance, wrong_base

TEACHER_STEPS, TEACHER_GUIDANCE = 40, 5.0
# A pair of experts works one trajectory together, so these must be the same in both files. Plain
# LoRAs go with any shift, so it is no reason to refuse them.
AGREEING = ("method", "denoising_step_indices_list", "flow_shift", "boundary", "pairing", "mode")
# fp32 schedulers round differently from our float64 schedule, by about 1e-4 of a timestep.
TIMESTEP_TOLERANCE = 1e-2


def sample_clips(config: SampleConfig, console: Console) -> list[Path]:
    """Generate every prompt; write mp4s, how each was made, and a contact sheet.

    Returns the clips' paths. Seconds are those of the pipeline's call: text encoder, transformers
    and VAE, without loading.
    """
    say = partial(support.say, console)
    spec = read_model_spec(resolve_model(config.model, ["*"]))
    config.check_against(spec)
    loras = read_loras(config.lora, spec) if config.lora else []
    student = loras[0].provenance if loras and loras[0].provenance.method == "distill" else None
    if student is not None:
        config.check_few_steps()
    shift = many_steps_shift(config, loras, spec)
    single = any(lora.provenance.expert == "full" for lora in loras)
    bases = _bases(config, spec, single=single)
    for component, base in bases.items():
        for line in filter(None, (base.describe(), *base.notes())):
            say(f"base     {component}: {line}")
    for lora in loras:
        found = base_digest(spec.folder, lora.component, bases[lora.component])
        wrong = wrong_base(lora.path, lora.provenance, found, str(spec.folder))
        for warning in filter(None, (lora.file.note, wrong)):
            say(f"warning  {warning}", style="yellow")
    experts = [lora.provenance.expert for lora in loras]
    if spec.two_experts and len(experts) == 1 and experts != ["full"]:
        say(
            f"warning  only the {experts[0]}-noise expert has a LoRA; the other runs "
            f"{'undistilled' if student else 'without one'}. Give both with --lora … --lora …",
            style="yellow",
        )

    image = fit_image(config.image, config.height, config.width) if config.image else None
    check_installed(config.base_precision)
    device_name = chosen_device(config.device)
    take_device(device_name)
    check_writable("--output", config.output)
    device = torch.device(device_name)
    pipeline = build_pipeline(
        spec,
        from_image=image is not None,
        loras=loras,
        bases=bases,
        dtype=DTYPES[config.dtype],
        device=device,
    )
    place(pipeline, config, device, say)
    kind = "teacher" if config.teacher else "student" if student else "lora"
    rows, paths, records = [], [], []
    for number, prompt in enumerate(track(config.prompt, "sample", console=console)):
        rng = torch.Generator().manual_seed(
            int(counted_rng(config.seed, "sample", prompt).integers(2**32))
        )
        if student is not None:
            assert student.pairing is not None
            schedule = student.schedule
            pipeline.scheduler = student_scheduler(schedule, student.pairing, rng)
            steps, scale = len(schedule.indices), 1.0
        else:
            pipeline.scheduler = teacher_scheduler(shift)
            steps = TEACHER_STEPS if config.steps is None else config.steps
            scale = TEACHER_GUIDANCE if config.guidance_scale is None else config.guidance_scale

        visits = VisitedSteps(pipeline)
        started = time.monotonic()
        clip = generate(
            pipeline, spec.family, config, prompt, image, steps=steps, scale=scale, rng=rng
        )
        seconds = time.monotonic() - started
        visits.close()
        if student is not None:
            visits.check(schedule, one_transformer="full" in experts)

        paths.append(config.output / f"{kind}-{number:03d}.mp4")
        write_mp4(paths[-1], clip, config.fps)
        rows.append((f"{kind}: {prompt}", clip))
        passes = len(visits.visited)
        records.append(
            {
                "file": paths[-1].name,
                "prompt": prompt,
                "seed": config.seed,
                "steps": steps,
                "guidance_scale": scale,
                "dtype": config.dtype,
                "base_precision": config.base_precision or config.dtype,
                "transformer_passes": passes,
                "seconds": round(seconds, 3),
            }
        )
        say(f"clip     {paths[-1]} ({passes} transformer passes, {seconds:.1f} s)")
    write_json(config.output / f"{kind}.json", records)
    sheet = config.output / f"{kind}-sheet.png"
    contact_sheet(rows).save(sheet)
    say(f"sheet    {sheet}")
    return paths


def _bases(config: SampleConfig, spec: ModelSpec, *, single: bool) -> dict[str, Base]:
    """Component → its weights. `single`: the first runs every step (a `full` LoRA).

    Raises UserError for weights of an expert that takes no part, or that don't fit.
    """
    base = Base.parse(config.transformer_path, config.base_lora)
    base_high = Base.parse(config.transformer_high_path, config.base_lora_high)
    if spec.two_experts and not single:
        bases = {"transformer": base_high, "transformer_2": base}
    elif found := base_high.describe():
        raise UserError(
            f"--transformer-high-path, --base-lora-high: found {found}, but one transformer "
            "runs every step here. Leave out -high."
        )
    else:
        bases = {"transformer": base}
    for component, own in bases.items():
        own.check(spec, component)
    return bases


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA file and what it says about its training."""

    file: LoraFile
    provenance: Provenance

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def component(self) -> str:
        """The transformer that it is for."""
        return component_of(self.provenance.expert)


def read_loras(paths: Sequence[Path], spec: ModelSpec) -> list[TrainedLora]:
    """Read the files, in any form; UserError when they don't fit the model or one another."""
    # Provenance first: the tensors may be large
    trained = [(path, read_provenance(path)) for path in paths]
    loras = [TrainedLora(read_lora(path), provenance) for path, provenance in trained]
    experts = [lora.provenance.expert for lora in loras]
    if len(set(experts)) != len(experts) or ("full" in experts and len(experts) > 1):
        raise UserError(
            f"--lora: found experts {', '.join(experts)}; expected one, or a high and a low one."
        )
    first = loras[0]
    for other in loras[1:]:
        for field in AGREEING:
            if field == "flow_shift" and first.provenance.method == "lora":
                continue
            a, b = getattr(first.provenance, field), getattr(other.provenance, field)
            if a != b:
                raise UserError(
                    f"--lora: {first.path} and {other.path} were trained apart: {field} is {a!r} "
                    f"in the first and {b!r} in the second. Train both with the same value."
                )
    if first.provenance.mode != spec.mode:
        raise UserError(
            f"--lora: {first.path} was trained for {first.provenance.mode}, the model "
            f"{spec.folder} is {spec.mode}."
        )
    check_expert(first.path, first.provenance.expert, spec)
    for lora in loras:
        check_fits_model(lora.file, spec, lora.component)
        if lora.file.lora.diffs:
            raise UserError(
                f"--lora: {lora.path} changes whole weights ({next(iter(lora.file.lora.diffs))}), "
                "which no adapter can. Merge it (wantrain merge), or leave them out: wantrain "
                "export --drop-extras"
            )
    return loras


def many_steps_shift(config: SampleConfig, loras: Sequence[TrainedLora], spec: ModelSpec) -> float:
    """The shift of the many steps: as asked for, else that of the LoRAs, else the family's.

    UserError where two LoRAs leave it open.
    """
    if config.flow_shift is not None:
        return config.flow_shift
    trained = [lora.provenance.flow_shift for lora in loras] or [spec.flow_shift]
    if len(set(trained)) > 1:
        raise UserError(
            f"--flow-shift: {loras[0].path} was trained at shift {trained[0]:g} and "
            f"{loras[1].path} at {trained[1]:g}. Choose the one to sample with, e.g. --flow-shift "
            f"{spec.flow_shift:g}."
        )
    return trained[0]


def build_pipeline(
    spec: ModelSpec,
    *,
    from_image: bool,
    loras: Sequence[TrainedLora],
    bases: Mapping[str, Base],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The diffusers pipeline with the LoRAs applied, on the CPU; VAE in fp32, the rest in `dtype`.

    `bases`: what each transformer that takes part is made of; LoRAs are merged into it on `device`.

    A `full` LoRA is for every step, so the second expert is left out.
    """
    kind = spec.family.load_class("image_pipeline" if from_image else "pipeline")
    transformers.utils.logging.disable_progress_bar()  # ours follows; two would tear each other
    parts = _weighty_parts(spec, dtype, bases)
    pipeline = kind(**parts, **_light_parts(spec, parts, from_image=from_image))
    for component, base in bases.items():
        merge(getattr(pipeline, component), base.merged, device)
    for lora in loras:
        _apply(lora, getattr(pipeline, lora.component))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _apply(lora: TrainedLora, transformer: Any) -> None:
    """Add a LoRA of any form to the transformer, as an adapter that is named after its expert.

    Read by us and handed over in diffusers' own form: what diffusers makes of the others is not the
    same. It fails at kohya's where a layer of a block is left out, and multiplies A by the strength
    of ComfyUI's, which rounds in bf16.
    """
    tensors, needed = to_form(lora.file.lora, "diffusers")
    transformer.load_lora_adapter(
        tensors,
        prefix=DIFFUSERS_PREFIX.removesuffix("."),
        adapter_name=lora.provenance.expert,
        metadata=json.loads(needed[PEFT_METADATA_KEY]),
        low_cpu_mem_usage=True,  # takes the tensors as they are, in the file's dtype
    )


def place(
    pipeline: Any, config: SampleConfig, device: torch.device, say: Callable[[str], None]
) -> None:
    """Quantise the transformers if so asked, and bring the pipeline, on the CPU, to `device`.

    With `low_vram` the blocks of transformers (LoRAs too) and text encoder stream, and what is
    outside of them comes and goes with its component. UserError where memory can't be locked.
    """
    experts = [e for e in (pipeline.transformer, pipeline.transformer_2) if e is not None]
    for transformer in experts:
        quantise(transformer, config.base_precision, device)
    if config.low_vram:
        stacks = [*map(blocks_of, experts), pipeline.text_encoder.encoder.block]
        streamed = [StreamedBlocks(list(stack.requires_grad_(False)), device) for stack in stacks]
        say(streaming_line(streamed))
    if config.low_vram or config.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _weighty_parts(
    spec: ModelSpec, dtype: torch.dtype, bases: Mapping[str, Base]
) -> dict[str, Any]:
    """All of a pipeline that has weights, by name. None is loaded by diffusers' pipeline, which
    would leave out what it has no place for. Raises UserError."""
    parts = {
        component: load_weights(spec, component, dtype=dtype, own=base.own)
        for component, base in bases.items()
    }
    others = {"text_encoder": dtype, "vae": torch.float32}
    if spec.image_dim is not None:  # in fp32, as the shards' embeddings were computed
        others["image_encoder"] = torch.float32
    for component, own in others.items():
        parts[component] = weights.load_component(spec.family, spec.folder, component, dtype=own)
    return parts


def _light_parts(
    spec: ModelSpec, weighty: Mapping[str, Any], *, from_image: bool
) -> dict[str, Any]:
    """The rest of a pipeline, by name. The second expert is left out where it is none of the parts.
    Raises UserError."""
    two_experts = "transformer_2" in weighty
    parts: dict[str, Any] = {
        "tokenizer": load_tokenizer(spec.folder),
        "scheduler": teacher_scheduler(spec.flow_shift),
        "boundary_ratio": spec.boundary if two_experts else None,
        "expand_timesteps": spec.mode == "ti2v",
        **({} if two_experts else {"transformer_2": None}),
    }
    if from_image and spec.image_dim is None:
        parts |= {"image_encoder": None, "image_processor": None}
    elif from_image:
        size = weighty["image_encoder"].config.image_size
        kind = transformers.CLIPImageProcessor
        parts["image_processor"] = load_image_processor(kind, spec.folder, size)
    return parts


def student_scheduler(schedule: Schedule, pairing: Pairing, generator: torch.Generator) -> Any:
    """A diffusers scheduler that visits the trained steps, however many it is asked for.

    The pipelines pass no sigmas, and `num_inference_steps=4` alone visits other timesteps. The
    re-noising scheduler also gets its generator here: the pipelines don't hand theirs on.
    """
    kind = FlowMatchLCMScheduler if pairing == "renoise" else FlowMatchEulerDiscreteScheduler
    sigmas = [index / TIMESTEPS for index in schedule.indices]  # the scheduler shifts them itself

    class TrainedSteps(kind):  # type: ignore[valid-type,misc]
        def set_timesteps(self, *_: Any, device: Any = None, **__: Any) -> None:
            super().set_timesteps(sigmas=sigmas, device=device)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **{"generator": generator} | kwargs)

    return TrainedSteps(shift=schedule.shift)


def teacher_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Wan's usual sampler, at the shift that LoRAs are trained with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


class VisitedSteps:
    """Records (expert, timestep) of every transformer call, to prove which steps were taken."""

    def __init__(self, pipeline: Any) -> None:
        self.visited: list[tuple[str, float]] = []
        self._hooks = [
            module.register_forward_pre_hook(self._record(expert), with_kwargs=True)
            for expert, name in (("high", "transformer"), ("low", "transformer_2"))
            if (module := getattr(pipeline, name, None)) is not None
        ]

    def _record(self, expert: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            # Of ti2v models every token has one, 0 in a first frame that is given: the last counts.
            self.visited.append((expert, float(kwargs["timestep"].flatten()[-1])))

        return hook

    def check(self, schedule: Schedule, *, one_transformer: bool) -> None:
        """Raise unless exactly the trained timesteps were visited, each by the expert owning it."""
        high = len(schedule.indices) if one_transformer else len(schedule.owned_steps("high"))
        expected = [
            ("high" if step < high else "low", t) for step, t in enumerate(schedule.timesteps)
        ]
        same = len(expected) == len(self.visited) and all(
            a == b and abs(s - t) < TIMESTEP_TOLERANCE
            for (a, s), (b, t) in zip(expected, self.visited, strict=True)
        )
        if not same:
            raise RuntimeError(f"sampled at {self.visited}, trained at {expected}")

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def fit_image(path: Path, height: int, width: int) -> Image.Image:
    """The first frame for i2v: covered and centre-cropped as `wanprep encode` does it."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no image, or a truncated one"
        raise UserError(
            f"--image: cannot read {path} as an image ({why}). Expected e.g. PNG or JPEG."
        ) from error
    return fit_to(image, height, width)


def generate(
    pipeline: Any,
    family: Family,
    config: SampleConfig,
    prompt: str,
    image: Image.Image | None,
    *,
    steps: int,
    scale: float,
    rng: torch.Generator,
) -> Clip:
    """One clip, (F, H, W, 3) uint8."""
    frames = pipeline(
        prompt=prompt,
        negative_prompt=(
            family.negative_prompt if config.negative_prompt is None else config.negative_prompt
        ),
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=rng,
        max_sequence_length=family.text_tokens,
        output_type="np",
        **({} if image is None else {"image": image}),
    ).frames[0]
    rounded: Clip = (np.asarray(frames) * 255).round().astype(np.uint8)
    return rounded
