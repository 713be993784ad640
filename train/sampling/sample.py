"""`wantrain sample`: clips with LoRAs or without, at exactly the trained steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image
from rich.console import Console
from rich.progress import track

from shared.cli import support
from shared.errors import UserError
from shared.format.resize import fit_to
from shared.io import stills
from shared.io.durable import write_json
from shared.io.mp4 import Clip, write_mp4
from shared.models.family import Family
from shared.models.spec import (
    TIMESTEPS,
    ModelSpec,
    in_train_mode,
    read_model_spec,
    resolve_model,
)
from train.functional.rng import clip_generator
from train.functional.schedule import Schedule
from train.options import Pairing
from train.sampling.config import TEACHER_GUIDANCE, TEACHER_STEPS, PipelineConfig, SampleConfig
from train.sampling.contact_sheet import contact_sheet
from train.sampling.pipeline import TrainedLora, open_pipeline, read_loras, teacher_scheduler
from train.saving.provenance import Provenance

# fp32 schedulers round differently from our float64 schedule, by about 1e-4 of a timestep.
TIMESTEP_TOLERANCE = 1e-2


def sample_clips(config: SampleConfig, console: Console) -> list[Path]:
    """Generate every prompt; write mp4s, how each was made, and a contact sheet.

    Returns the clips' paths.
    """
    say = partial(support.say, console)
    spec = read_model_spec(resolve_model(config.model, ["*"]))
    to_image = config.last_image is not None
    if to_image:
        if "flf2v" not in spec.modes:
            raise UserError(
                f"--last-image: {config.model} is a {spec.mode} model and takes no last frame. "
                "Leave it out, or use Wan 2.2 I2V-A14B or Wan 2.1 FLF2V."
            )
        spec = in_train_mode(spec, "flf2v")
    config.check_against(spec, from_image=config.image is not None, to_image=to_image)
    loras = read_loras(config.lora, spec) if config.lora else []
    how: Provenance | ManySteps
    if loras and (student := loras[0].provenance).method == "distill":
        config.check_few_steps()
        how = student
    else:
        how = ManySteps(
            shift=many_steps_shift(config.flow_shift, loras, spec),
            steps=TEACHER_STEPS if config.steps is None else config.steps,
            guidance_scale=(
                TEACHER_GUIDANCE if config.guidance_scale is None else config.guidance_scale
            ),
            negative_prompt=config.negative_prompt,
        )
    image, last = (
        None if path is None else fit_image(path, config.height, config.width, option)
        for path, option in ((config.image, "--image"), (config.last_image, "--last-image"))
    )
    pipeline = open_pipeline(
        config, spec, loras, from_image=image is not None, output=config.output, say=say
    )
    kind = "teacher" if config.teacher else "student" if isinstance(how, Provenance) else "lora"
    rows, paths, records = [], [], []
    for number, prompt in enumerate(track(config.prompt, "sample", console=console)):
        made = make_clip(
            pipeline, spec.family, config, prompt, image, last, seed=config.seed, how=how
        )
        paths.append(config.output / f"{kind}-{number:03d}.mp4")
        write_mp4(paths[-1], made.frames, config.fps)
        rows.append((f"{kind}: {prompt}", made.frames))
        records.append(
            {
                "file": paths[-1].name,
                "prompt": prompt,
                "seed": config.seed,
                "steps": made.steps,
                "guidance_scale": made.guidance_scale,
                "dtype": config.dtype,
                "base_precision": config.base_precision or config.dtype,
                "transformer_passes": made.transformer_passes,
                "seconds": round(made.seconds, 3),
            }
        )
        passes = f"{made.transformer_passes} transformer passes"
        say(f"clip     {paths[-1]} ({passes}, {made.seconds:.1f} s)")
    write_json(config.output / f"{kind}.json", records)
    sheet = config.output / f"{kind}-sheet.png"
    contact_sheet(rows).save(sheet)
    say(f"sheet    {sheet}")
    return paths


@dataclass(frozen=True, kw_only=True)
class ManySteps:
    """How the base model samples, and a plain LoRA on it. A student does as it was trained."""

    shift: float
    steps: int = TEACHER_STEPS
    guidance_scale: float = TEACHER_GUIDANCE
    negative_prompt: str | None = None
    """None: the family's published one."""


def many_steps_shift(asked: float | None, loras: Sequence[TrainedLora], spec: ModelSpec) -> float:
    """The shift of the many steps: as asked for, else that of the LoRAs, else the family's.

    UserError where two LoRAs leave it open.
    """
    if asked is not None:
        return asked
    trained = [lora.provenance.flow_shift for lora in loras] or [spec.flow_shift]
    if len(set(trained)) > 1:
        raise UserError(
            f"--flow-shift: {loras[0].path} was trained at shift {trained[0]:g} and "
            f"{loras[1].path} at {trained[1]:g}. Choose the one to sample with, e.g. --flow-shift "
            f"{spec.flow_shift:g}."
        )
    return trained[0]


@dataclass(frozen=True, kw_only=True)
class MadeClip:
    """A clip and what it took."""

    frames: Clip
    steps: int
    guidance_scale: float
    transformer_passes: int
    seconds: float
    """Of the pipeline's call: text encoder, transformers and VAE, without loading."""


def make_clip(
    pipeline: Any,
    family: Family,
    config: PipelineConfig,
    prompt: str,
    image: Image.Image | None,
    last_image: Image.Image | None = None,
    *,
    seed: int,
    how: Provenance | ManySteps,
) -> MadeClip:
    """One clip, with noise from `seed` and the prompt. Of a student, exactly the trained steps."""
    rng = clip_generator(seed, prompt)
    if isinstance(how, ManySteps):
        pipeline.scheduler = teacher_scheduler(how.shift)
        steps, scale, negative = how.steps, how.guidance_scale, how.negative_prompt
    else:
        assert how.pairing is not None
        pipeline.scheduler = student_scheduler(how.schedule, how.pairing, rng)
        steps, scale, negative = len(how.schedule.indices), 1.0, None
    visits = VisitedSteps(pipeline)
    started = time.monotonic()
    frames = pipeline(
        prompt=prompt,
        negative_prompt=family.negative_prompt if negative is None else negative,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=rng,
        max_sequence_length=family.text_tokens,
        output_type="np",
        **({} if image is None else {"image": image}),
        **({} if last_image is None else {"last_image": last_image}),
    ).frames[0]
    seconds = time.monotonic() - started
    visits.close()
    if not isinstance(how, ManySteps):
        visits.check(how.schedule, one_transformer=how.expert == "full")
    return MadeClip(
        frames=(np.asarray(frames) * 255).round().astype(np.uint8),
        steps=steps,
        guidance_scale=scale,
        transformer_passes=len(visits.visited),
        seconds=seconds,
    )


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


def fit_image(path: Path, height: int, width: int, option: str = "--image") -> Image.Image:
    """A given frame for i2v: covered and centre-cropped as `wanprep encode` does it."""
    try:
        with stills.opened(path) as opened:
            image = stills.shown(opened)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no image, or a truncated one"
        raise UserError(
            f"{option}: cannot read {path} as an image ({why}). Expected e.g. PNG or JPEG."
        ) from error
    return fit_to(image, height, width)
