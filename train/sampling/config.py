"""The options of commands that make clips: type, default, help, group and check of each, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from shared.cli.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check_option, check_options
from shared.errors import UserError
from shared.format.captions import is_blank
from shared.models.spec import DEFAULT_MODEL, ModelSpec
from train.options import DEVICE, INPUT, OUTPUT, QuantisedPrecision

SHOWN, MODEL, CLIP, TEACHER = "What to show", "Model", "Clip", "Many steps"
TEACHER_STEPS, TEACHER_GUIDANCE = 40, 5.0


# fmt: off
@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What every command takes that makes clips: weights, shape of a clip, device."""

    lora: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="LoRA of `wantrain distill` or `wantrain lora`, in any of its formats; give it twice for a high and a low one, in any order.", show_default="none: give --teacher", rich_help_panel=MODEL)] = None
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the LoRAs are for: a diffusers or Wan folder, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=MODEL)] = DEFAULT_MODEL
    transformer_path: Annotated[Path | None, typer.Option(metavar="PATH", help="Custom weights for the low-noise expert, or for MODEL's only transformer, as in `wantrain distill`.", show_default="MODEL's", rich_help_panel=MODEL)] = None
    transformer_high_path: Annotated[Path | None, typer.Option(metavar="PATH", help="The same for the high-noise expert.", show_default="MODEL's", rich_help_panel=MODEL)] = None
    base_lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="LoRA that was merged into the low-noise expert, or the only transformer, for training; at strength X (1 if omitted). Can be given several times.", show_default="none", rich_help_panel=MODEL)] = None
    base_lora_high: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="The same for the high-noise expert.", show_default="none", rich_help_panel=MODEL)] = None

    height: Annotated[int, typer.Option(metavar="PX", help="Height in pixels, a multiple of 16.", rich_help_panel=CLIP)] = 480
    width: Annotated[int, typer.Option(metavar="PX", help="Width in pixels, a multiple of 16.", rich_help_panel=CLIP)] = 832
    num_frames: Annotated[int, typer.Option(metavar="N", help="Length in frames, of the form 4n+1.", rich_help_panel=CLIP)] = 81
    fps: Annotated[int, typer.Option(metavar="N", help="Frames per second of the mp4; Wan is trained at 16.", rich_help_panel=CLIP), AT_LEAST_1] = 16
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of each clip's noise.", rich_help_panel=CLIP)] = 42

    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of transformers and text encoder (the VAE is fp32).", rich_help_panel=DEVICE)] = "bf16"
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=DEVICE)] = "auto"
    base_precision: Annotated[QuantisedPrecision | None, typer.Option(help="Store the linear layers of the transformers' blocks in 8 or 4 bits, as in `wantrain distill`: int8 and fp8 take half of bf16's memory, nf4 (bitsandbytes) less than a third.", show_default="as --dtype", rich_help_panel=DEVICE)] = None
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the running component in GPU memory, as in diffusers' model offloading.", show_default="off", rich_help_panel=DEVICE)] = False
    low_vram: Annotated[bool, typer.Option("--low-vram", help="Like --offload, and keep the blocks of transformers and text encoder in CPU memory; each is copied to the GPU while the one before it computes.", show_default="off", rich_help_panel=DEVICE)] = False
    # fmt: on

    def check_against(self, spec: ModelSpec, *, from_image: bool, to_image: bool = False) -> None:
        """UserError unless the model, in this mode, can make clips of this shape from these inputs.

        `to_image`: a last frame is given, too.
        """
        multiple, time = spec.side_multiple, spec.stride[0]
        for name, side in (("height", self.height), ("width", self.width)):
            fine = side >= multiple and side % multiple == 0
            check_option(name, side, fine, f"a multiple of {multiple}")
        if self.num_frames < 1 or (self.num_frames - 1) % time:
            below = max(1, (self.num_frames - 1) // time * time + 1)
            raise UserError(
                f"--num-frames: found {self.num_frames}, expected {time}n+1, e.g. {below} or "
                f"{below + time}."
            )
        if spec.given_frames and not from_image:
            raise UserError(
                f"--image: {self.model} is an i2v model and needs a first frame: --image FILE."
            )
        if len(spec.given_frames) > 1 and not to_image:
            raise UserError(
                f"--last-image: {self.model} is a first-last-frame model and needs a last frame: "
                "wantrain sample --last-image FILE."
            )
        if spec.mode == "t2v" and from_image:
            raise UserError(
                f"--image: {self.model} is a t2v model and takes no image. Leave it out."
            )


# fmt: off
@dataclass(frozen=True, kw_only=True)
class SampleConfig(PipelineConfig):
    """Make clips with LoRAs, or with the base model.

    A student, a LoRA of `wantrain distill`, uses exactly the timesteps that it was trained on. A plain one, of `wantrain lora`, uses the base model's many steps with CFG. Two experts need two LoRAs of the same command.

    Next: the same files in diffusers or ComfyUI, see docs/use-your-lora.md
    """

    PANELS: ClassVar[Sequence[str]] = (SHOWN, MODEL, CLIP, TEACHER, DEVICE)

    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="Prompt; one clip for each --prompt given.", rich_help_panel=SHOWN)]
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="First frame, for i2v models; resized to cover the clip and cropped at the centre.", show_default="none", rich_help_panel=SHOWN)] = None
    last_image: Annotated[Path | None, typer.Option(metavar="FILE", help="Last frame, for Wan 2.2 I2V-A14B, Wan 2.1 FLF2V and LoRAs that were trained with --train-mode flf2v; fitted like --image.", show_default="none", rich_help_panel=SHOWN)] = None

    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the clips (mp4) and the contact sheet (png).", rich_help_panel=CLIP)] = Path("samples")

    teacher: Annotated[bool, typer.Option("--teacher", help="Sample the base model itself, with many steps, CFG and no LoRA.", show_default="off", rich_help_panel=TEACHER)] = False
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of --teacher and of plain LoRAs; a student uses the trained steps.", show_default="40", rich_help_panel=TEACHER), AT_LEAST_1] = None
    guidance_scale: Annotated[float | None, typer.Option(metavar="X", help="CFG scale of --teacher and of plain LoRAs; a student needs none.", show_default="5", rich_help_panel=TEACHER), NOT_NEGATIVE] = None
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt of that CFG.", show_default="Wan's published one", rich_help_panel=TEACHER)] = None
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift of the noise schedule of --teacher and of plain LoRAs.", show_default="the LoRA's; 12 for Wan 2.2 A14B t2v, 16 for Wan 2.1 FLF2V, else 5", rich_help_panel=TEACHER), POSITIVE] = None
    # fmt: on

    def __post_init__(self) -> None:
        if self.teacher == bool(self.lora):
            raise UserError(
                "--lora: found "
                + ("both --lora and --teacher" if self.teacher else "neither --lora nor --teacher")
                + ", expected one: --lora FILE, or --teacher for only the base model."
            )
        if any(map(is_blank, self.prompt)):
            raise UserError("--prompt: found an empty prompt, expected text.")
        check_options(self)

    def check_few_steps(self) -> None:
        """UserError where something is asked for that a few-step LoRA does not take."""
        for name in ("steps", "guidance_scale", "negative_prompt", "flow_shift"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')}: found with --lora of a student, which uses "
                    "the trained steps, without guidance. It is an option of --teacher "
                    "and of LoRAs of `wantrain lora`."
                )


# fmt: off
@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decode validation clips with the VAE.

    Training runs no VAE, so its previews show the latents' colours; this decodes every clip that a run has sampled, during training or afterwards.

    Next: wantrain sample --lora FILE --prompt TEXT
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, OUTPUT, DEVICE)

    latents: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="Latents from --validation-steps: a file, or a folder and its subfolders. Can be given several times.", rich_help_panel=INPUT)]
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model whose VAE decodes: a diffusers or Wan folder, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL

    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the clips (mp4) and the contact sheet (png).", rich_help_panel=OUTPUT)] = Path("decoded")
    fps: Annotated[int, typer.Option(metavar="N", help="Frames per second of the mp4; Wan is trained at 16.", rich_help_panel=OUTPUT), AT_LEAST_1] = 16

    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format that the VAE computes in.", rich_help_panel=DEVICE)] = "fp32"
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=DEVICE)] = "auto"
    # fmt: on

    def __post_init__(self) -> None:
        check_options(self)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class WorkflowConfig:
    """Write a ComfyUI workflow for LoRAs.

    Runs leave one beside their LoRA; this writes it for files with other names, for the two LoRAs of plain experts together, or for older ones. It loads the published base, holds sampler, steps, shift and noise levels of the training, and makes a clip of the training's size. There are two files, one to open in ComfyUI and one for its server (api).

    Next: docs/use-your-lora.md
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, OUTPUT)

    lora: Annotated[list[Path], typer.Option(metavar="FILE", help="LoRA of `wantrain distill` or `wantrain lora` in ComfyUI's or kohya's format; give it twice for a high and a low one, in any order.", rich_help_panel=INPUT)]

    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the two files.", rich_help_panel=OUTPUT)] = Path("workflow")
    # fmt: on
