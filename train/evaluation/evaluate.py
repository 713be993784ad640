"""`wantrain evaluate`: a teacher's clips and a student's, made or found, measured and compared.

One pipeline makes both: with its LoRAs off it is the teacher. Clips are measured as read back from
their mp4 files, so that those that exist already are measured alike; then only numbers and a
thumbnail of each are kept.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from shared.cli import support
from shared.cli.checks import check_writable
from shared.cli.console import count, named
from shared.errors import UserError
from shared.io.durable import write_bytes, write_json
from shared.io.mp4 import write_mp4
from shared.models.spec import read_model_spec, resolve_model
from train.evaluation.agreement import PromptAgreement
from train.evaluation.clips import (
    MEASURES,
    SIDES,
    STUDENT,
    TEACHER,
    MeasuredClip,
    by_prompt,
    measured_clip,
)
from train.evaluation.comparison import Comparison, compare
from train.evaluation.config import EvaluateConfig
from train.evaluation.page import page
from train.evaluation.prompts import Prompt, read_prompts
from train.sampling.pipeline import loras_off, open_pipeline, read_loras
from train.sampling.sample import ManySteps, fit_image, make_clip, many_steps_shift
from train.saving.provenance import read_provenance

_SEED = re.compile(r"(?P<prompt>.+)-seed(?P<seed>\d+)")


def evaluate_clips(config: EvaluateConfig, console: Console) -> dict[str, Comparison]:
    """Make or find the clips of both sides; write evaluation.json and the page, print the table.

    Returns what was found of each measure.
    """
    say = partial(support.say, console)
    check_writable("--output", config.output)
    if config.teacher_clips is not None and config.student_clips is not None:
        clips = list(_found(config.teacher_clips, config.student_clips, console))
    else:
        clips = list(_made(config, console, say))
    prompts = by_prompt(clips)
    compared = {}
    for name in MEASURES:  # variety: of the prompts that have several seeds
        having = [of for of in prompts.values() if all(name in of[side] for side in SIDES)]
        if having:
            compared[name] = compare(*([of[side][name] for of in having] for side in SIDES))
    settings = _settings(config)
    write_json(
        config.output / "evaluation.json",
        {
            "settings": settings,
            "measures": {name: asdict(found) for name, found in compared.items()},
            "prompts": [
                {"prompt": text, "image": image} | of for (text, image), of in prompts.items()
            ],
            "clips": [clip.record() for clip in clips],
        },
    )
    html = config.output / "evaluation.html"
    write_bytes(html, page(compared, clips, settings, config.fps).encode("utf-8", "replace"))
    Console().print(table(compared, prompts=len(prompts)))
    say(f"page     {html}")
    return compared


def _made(
    config: EvaluateConfig, console: Console, say: Callable[..., None]
) -> Iterator[MeasuredClip]:
    """Clips of the teacher, then of the student, each measured before the next is made."""
    prompts = read_prompts(config)
    from_image = prompts[0].image is not None
    spec = read_model_spec(resolve_model(config.model, ["*"]))
    assert config.lora is not None
    # The summary tells prompts apart by text and first frame.
    if "flf2v" in (spec.mode, read_provenance(config.lora[0]).mode):
        raise UserError(
            f"--lora: {config.lora[0]} is for first and last frames (flf2v), and evaluate takes no "
            "last frames. Compare with wantrain sample --last-image: once with --lora, once with "
            "--teacher."
        )
    config.check_against(spec, from_image=from_image)
    loras = read_loras(config.lora, spec)
    student = loras[0].provenance
    if student.method != "distill":
        raise UserError(
            f"--lora: {loras[0].path} is a plain LoRA of `wantrain {student.method}`, expected a "
            "few-step one of `wantrain distill`."
        )
    images = {
        path: fit_image(path, config.height, config.width)
        for path in {prompt.image for prompt in prompts}
        if path is not None
    }
    jobs = [
        (f"{number:03d}-seed{seed}.mp4", prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for side in SIDES:
        folder = config.output / side
        check_writable("--output", folder)
        if others := sorted({f.name for f in folder.glob("*.mp4")} - {name for name, *_ in jobs}):
            raise UserError(
                f"--output: {folder} has clips of another run ({named(others)}). Choose another "
                "folder, or delete them."
            )
    agreement = PromptAgreement(config.clip_model) if config.clip_model else None
    teacher = ManySteps(
        shift=many_steps_shift(config.flow_shift, loras, spec),
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
    )
    pipeline = open_pipeline(
        config, spec, loras, from_image=from_image, output=config.output, say=say
    )

    def clip_of(side: str, how: Any, name: str, prompt: Prompt, seed: int) -> MeasuredClip:
        image = None if prompt.image is None else images[prompt.image]
        made = make_clip(pipeline, spec.family, config, prompt.text, image, seed=seed, how=how)
        path = config.output / side / name
        write_mp4(path, made.frames, config.fps)
        say(f"clip     {path} ({made.transformer_passes} transformer passes, {made.seconds:.1f} s)")
        return measured_clip(side, prompt, seed, path, agreement)

    with loras_off(pipeline):
        for job in track(jobs, TEACHER, console=console):
            yield clip_of(TEACHER, teacher, *job)
    for job in track(jobs, STUDENT, console=console):
        yield clip_of(STUDENT, student, *job)


def _found(teacher: Path, student: Path, console: Console) -> Iterator[MeasuredClip]:
    """Clips that exist. UserError unless both folders have the same names, of the same sizes."""
    names = [{path.name for path in folder.glob("*.mp4")} for folder in (teacher, student)]
    if not names[0] or names[0] != names[1]:
        apart = sorted(names[0] ^ names[1])
        raise UserError(
            f"--teacher-clips, --student-clips: found {len(names[0])} mp4 files in {teacher} and "
            f"{len(names[1])} in {student}"
            + (f"; only one has {named(apart)}" if apart else "")
            + ". Expected the same names in both."
        )
    sizes: dict[str, tuple[int, ...]] = {}
    for side, folder in zip(SIDES, (teacher, student), strict=True):
        for name in track(sorted(names[0]), side, console=console):
            match = _SEED.fullmatch(Path(name).stem)
            text, seed = (match["prompt"], int(match["seed"])) if match else (Path(name).stem, None)
            clip = measured_clip(side, Prompt(text), seed, folder / name, None)
            if sizes.setdefault(name, clip.shape) != clip.shape:
                raise UserError(
                    f"--student-clips: {clip.path} has (frames, height, width) "
                    f"{clip.shape[:3]}, the teacher's {sizes[name][:3]}. Expected the same."
                )
            yield clip


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What both sides were made with, by option; of clips that exist, where they were."""
    made = (
        *("model", "lora", "height", "width", "num_frames", "seed", "seeds", "steps"),
        *("guidance_scale", "negative_prompt", "flow_shift", "dtype", "base_precision"),
        *("transformer_path", "transformer_high_path", "base_lora", "base_lora_high", "clip_model"),
    )
    names = made if config.teacher_clips is None else ("teacher_clips", "student_clips")
    asked = {name: value for name in names if (value := getattr(config, name)) is not None}
    return dict(json.loads(json.dumps(asked, default=str)))


def table(compared: dict[str, Comparison], *, prompts: int) -> Table:
    """The comparison for a terminal."""
    title = f"Student against teacher, {count(prompts, 'prompt')}"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for name in ("", "teacher", "student", "ratio", "95 %", ""):
        shown.add_column(name, justify="left" if not name else "right", header_style="dim")
    for name, found in compared.items():
        shown.add_row(name, *found.words(), MEASURES[name])
    return shown
