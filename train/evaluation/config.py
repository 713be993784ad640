"""The options of `wantrain evaluate`, each once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from shared.cli.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check_options
from shared.errors import UserError
from train.options import DEVICE
from train.sampling.config import CLIP, MODEL, TEACHER_GUIDANCE, TEACHER_STEPS, PipelineConfig

SHOWN, EXISTING, TEACHER = "What to compare", "Clips that exist already", "Teacher"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PipelineConfig):
    """Compare a few-step LoRA with its teacher, in numbers.

    Makes clips of the same prompts and seeds with the base model (many steps, CFG) and with the LoRAs of `wantrain distill`, and measures both: motion, contrast, saturation, sharpness, variety. Writes evaluation.json and a page, evaluation.html. Needs OpenCV: pip install 'wandistill[evaluate]'

    Next: what the numbers mean, see docs/evaluate.md
    """

    PANELS: ClassVar[Sequence[str]] = (SHOWN, EXISTING, MODEL, CLIP, TEACHER, DEVICE)

    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Prompt. Can be given several times; intervals need at least two prompts, and twenty say more.", show_default="none", rich_help_panel=SHOWN)] = None
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="More prompts: a text file with one a line. A line may end in --i FILE, its first frame.", show_default="none", rich_help_panel=SHOWN)] = None
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="First frame, for i2v models: one for every --prompt, or one for each, in order.", show_default="none", rich_help_panel=SHOWN)] = None
    seeds: Annotated[int, typer.Option(metavar="N", help="Clips of each prompt, with the seeds --seed, --seed + 1 …; variety needs at least 2.", rich_help_panel=SHOWN), AT_LEAST_1] = 2
    clip_model: Annotated[Path | None, typer.Option(metavar="DIR", help="CLIP model (a folder for transformers' CLIPModel and CLIPProcessor), to measure how well clips agree with their prompts. It runs on the CPU.", show_default="none: not measured", rich_help_panel=SHOWN)] = None

    teacher_clips: Annotated[Path | None, typer.Option(metavar="DIR", help="Measure the mp4 files of this folder, and make none. Files whose names differ only in a number after -seed are clips of one prompt.", show_default="none", rich_help_panel=EXISTING)] = None
    student_clips: Annotated[Path | None, typer.Option(metavar="DIR", help="The student's, with the same file names.", show_default="none", rich_help_panel=EXISTING)] = None

    lora: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="LoRA of `wantrain distill`, in any of its formats; give it twice for a high and a low one, in any order.", show_default="none: give clips that exist", rich_help_panel=MODEL)] = None
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for evaluation.json, evaluation.html, and the clips in teacher/ and student/.", rich_help_panel=CLIP)] = Path("evaluation")

    steps: Annotated[int, typer.Option(metavar="N", help="Steps of the teacher.", rich_help_panel=TEACHER), AT_LEAST_1] = TEACHER_STEPS
    guidance_scale: Annotated[float, typer.Option(metavar="X", help="CFG scale of the teacher.", rich_help_panel=TEACHER), NOT_NEGATIVE] = TEACHER_GUIDANCE
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt of that CFG.", show_default="Wan's published one", rich_help_panel=TEACHER)] = None
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift of the teacher's noise schedule.", show_default="the LoRA's", rich_help_panel=TEACHER), POSITIVE] = None
    # fmt: on

    def __post_init__(self) -> None:
        check_options(self)
        if (self.teacher_clips is None) != (self.student_clips is None):
            raise UserError("--teacher-clips, --student-clips: found one, expected both or none.")
        making = ("lora", "prompt", "prompts", "image", "clip_model")
        given = ", ".join(f"--{n.replace('_', '-')}" for n in making if getattr(self, n))
        if self.teacher_clips is not None and given:
            raise UserError(
                f"--teacher-clips: found with {given}, which are for clips to be made. Leave out "
                "one or the other."
            )
        if self.teacher_clips is None and not self.lora:
            raise UserError(
                "--lora: found none, expected the LoRA of `wantrain distill`, or of both experts: "
                "--lora FILE --lora FILE. For clips that exist: --teacher-clips DIR "
                "--student-clips DIR."
            )
        if self.teacher_clips is None and not (self.prompt or self.prompts):
            raise UserError("--prompt: found none, expected --prompt TEXT, or --prompts FILE.")
        if self.teacher_clips is None and self.num_frames == 1:
            raise UserError("--num-frames: found 1, expected 5 or more: motion is between frames.")
