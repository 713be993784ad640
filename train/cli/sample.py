"""`wantrain sample` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.support import Command
from shared.device import default_device
from shared.models.spec import DEFAULT_MODEL
from train.options import DEVICE

SAMPLE_EXAMPLES = """
# Wan2.2-I2V-A14B itself, for comparison: 40 steps with CFG
wantrain sample --teacher --image frame.png --prompt "a cat turns its head"

# Wan2.2-I2V-A14B with the LoRAs of both experts, in 4 steps
wantrain sample --lora output_dir_high/lora-high-diffusers.safetensors \\
    --lora output_dir_distill/lora-low-diffusers.safetensors \\
    --image frame.png --prompt "a cat turns its head"

# a LoRA of `wantrain lora`, by the base model's sampler
wantrain sample --lora output_dir_lora/lora-low-diffusers.safetensors \\
    --steps 30 --image frame.png --prompt "a cat turns its head"

# the bundled toy model with its LoRA of `wantrain distill`, seconds on a CPU
wantrain sample --model toy --lora toy-lora/lora-full-diffusers.safetensors \\
    --height 64 --width 64 --num-frames 17 --output toy-samples \\
    --prompt "a red circle moving left"
"""

SHOWN, MODEL, CLIP, TEACHER = "What to show", "Model", "Clip", "Many steps"


# fmt: off
def sample(
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to show; one clip for each --prompt given.", rich_help_panel=SHOWN)],
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="First frame, for i2v models; resized to cover the clip and cropped at the centre.", show_default="none", rich_help_panel=SHOWN)] = None,

    lora: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="LoRA of `wantrain distill` or `wantrain lora`, in any of its forms; give it twice for a high and a low one, in any order.", show_default="none: give --teacher", rich_help_panel=MODEL)] = None,
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the LoRAs are of: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=MODEL)] = DEFAULT_MODEL,
    transformer_path: Annotated[Path | None, typer.Option(metavar="PATH", help="Weights of your own for the low-noise expert, or for MODEL's only transformer, as `wantrain distill` takes them.", show_default="MODEL's", rich_help_panel=MODEL)] = None,
    transformer_high_path: Annotated[Path | None, typer.Option(metavar="PATH", help="The same for the high-noise expert.", show_default="MODEL's", rich_help_panel=MODEL)] = None,
    base_lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="LoRA that was merged into the low-noise expert, or into the only transformer, for the training; at strength X (1 if left out). Can be given several times.", show_default="none", rich_help_panel=MODEL)] = None,
    base_lora_high: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="The same for the high-noise expert.", show_default="none", rich_help_panel=MODEL)] = None,

    height: Annotated[int, typer.Option(metavar="PX", help="Height in pixels, a multiple of 16.", rich_help_panel=CLIP)] = 480,
    width: Annotated[int, typer.Option(metavar="PX", help="Width in pixels, a multiple of 16.", rich_help_panel=CLIP)] = 832,
    num_frames: Annotated[int, typer.Option(metavar="N", help="Length in frames, of the form 4n+1.", rich_help_panel=CLIP)] = 81,
    fps: Annotated[int, typer.Option(metavar="N", help="Frames per second of the mp4; Wan is trained at 16.", rich_help_panel=CLIP)] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides the noise that each clip starts from.", rich_help_panel=CLIP)] = 42,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the clips (mp4) and the contact sheet (png).", rich_help_panel=CLIP)] = Path("samples"),

    teacher: Annotated[bool, typer.Option("--teacher", help="Sample the base model itself, with many steps, CFG and no LoRA.", show_default="off", rich_help_panel=TEACHER)] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of --teacher and of plain LoRAs; a student takes those it was trained on.", show_default="40", rich_help_panel=TEACHER)] = None,
    guidance_scale: Annotated[float | None, typer.Option(metavar="X", help="CFG scale of --teacher and of plain LoRAs; a student needs none.", show_default="5", rich_help_panel=TEACHER)] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What that CFG leads away from.", show_default="Wan's published one", rich_help_panel=TEACHER)] = None,
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift of the noise schedule of --teacher and of plain LoRAs.", show_default="the LoRA's; 12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=TEACHER)] = None,

    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of transformers and text encoder (the VAE is fp32).", rich_help_panel=DEVICE)] = "bf16",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=DEVICE)] = "auto",
    base_precision: Annotated[Literal["fp8", "int8", "nf4"] | None, typer.Option(help="Keep the linear layers of the transformers' blocks in 8 or 4 bits, as `wantrain distill` does: int8 and fp8 take half of bf16's memory, nf4 (bitsandbytes) less than a third.", show_default="as --dtype says", rich_help_panel=DEVICE)] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep in GPU memory only the component that works, as diffusers' model offloading does.", show_default="off", rich_help_panel=DEVICE)] = False,
    low_vram: Annotated[bool, typer.Option("--low-vram", help="The same, and keep the blocks of transformers and text encoder in CPU memory; each is copied to the GPU while the one before it works.", show_default="off", rich_help_panel=DEVICE)] = False,
) -> None:
    """Make clips with LoRAs, or with the base model.

    A student, a LoRA of `wantrain distill`, takes exactly the timesteps that it was trained on. A plain one, of `wantrain lora`, takes the base model's many steps with CFG. Two experts need two LoRAs of the same command.

    Next: the same files in diffusers or ComfyUI, see docs/use-your-lora.md
    """
    from rich.console import Console

    from train.model.base import Base
    from train.sampling.sample import SampleConfig, sample_clips

    config = SampleConfig(
        model=model,
        base=Base.parse(transformer_path, base_lora),
        base_high=Base.parse(transformer_high_path, base_lora_high),
        prompts=tuple(prompt),
        loras=tuple(lora or ()),
        image=image,
        output=output,
        teacher=teacher,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        flow_shift=flow_shift,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        seed=seed,
        dtype=dtype,
        device=default_device() if device == "auto" else device,
        base_precision=base_precision,
        offload=offload,
        low_vram=low_vram,
    )
    sample_clips(config, Console(stderr=True))


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=Command, epilog=SAMPLE_EXAMPLES)(sample)
