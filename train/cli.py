"""The command line of stage two."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli_support import new_app, run
from shared.device import default_device
from shared.errors import UserError
from shared.help_page import HelpPage
from shared.model_spec import DEFAULT_MODEL

app = new_app("Distil few-step LoRAs of Wan models from shards, and sample with them.")

MODEL, RUN, LENGTH, DMD, LORA, DATA, DEVICE, SAMPLE = (
    "Model",
    "What is trained",
    "Length and checkpoints",
    "Distillation",
    "LoRA and optimizer",
    "Data",
    "Device",
    "Sampling",
)
Model = Annotated[
    str,
    typer.Option(
        "--pretrained-model-name-or-path",
        "--model",
        envvar="MODEL_NAME",
        help="Folder in diffusers layout, hub id, or a bundled toy: toy (t2v), toy-i2v.",
        rich_help_panel=MODEL,
    ),
]

DISTILL_EXAMPLES = """
# the low-noise expert of Wan2.2-I2V-A14B from shards/, then the high-noise one
wantrain distill --shards shards/
wantrain distill --shards shards/ --boundary-type high --output-dir output_dir_high

# what would it do? go on after an interruption
wantrain distill --shards shards/ --dry-run
wantrain distill --shards shards/ --resume-from-checkpoint latest

# the bundled toy model, seconds on a CPU
wantrain distill --model toy --max-train-steps 1 --train-batch-size 2 --rank 8
"""
SAMPLE_EXAMPLES = """
# both experts' LoRAs
wantrain sample --lora output_dir_high/lora-high-diffusers.safetensors \\
    --lora output_dir_distill/lora-low-diffusers.safetensors \\
    --image first-frame.png --prompt "a cat turns its head"

# the base model for comparison, at 40 steps with CFG
wantrain sample --teacher --image first-frame.png --prompt "a cat turns its head"

# the bundled toy model, seconds on a CPU
wantrain sample --model toy --teacher --negative-prompt "" --guidance-scale 2 \\
    --height 64 --width 64 --num-frames 17 --prompt "a red circle moving left"
"""


@app.callback()
def _wantrain() -> None:
    """Few-step LoRAs of Wan models, from shards."""


def _numbers(text: str, option: str) -> tuple[float, ...]:
    """ "1000 750" or "1000,750" → (1000.0, 750.0)."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise UserError(f"{option}: found {text!r}, expected numbers such as 1000,750.") from error


# fmt: off
@app.command(cls=HelpPage, epilog=DISTILL_EXAMPLES)
def distill(
    model: Model = DEFAULT_MODEL,
    shards: Annotated[Path, typer.Option(help="Cache written by `wanprep encode`.", rich_help_panel=RUN)] = Path("shards"),
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints, logs and the final LoRA go.", rich_help_panel=RUN)] = Path("output_dir_distill"),
    boundary_type: Annotated[Literal["low", "high", "full"] | None, typer.Option(help="Expert to train: low or high noise, or full for a model with one transformer (or one LoRA for all steps).", show_default="low where there are two experts, else full", rich_help_panel=RUN)] = None,
    seed: Annotated[int, typer.Option(help="Decides every random number of the run.", rich_help_panel=RUN)] = 42,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and the plan, then stop.", rich_help_panel=RUN)] = False,

    max_train_steps: Annotated[int | None, typer.Option(help="Generator updates of the run; overrides --num-train-epochs.", show_default="as many as the epochs have", rich_help_panel=LENGTH)] = None,
    num_train_epochs: Annotated[int, typer.Option(help="Passes over the cache, updates of both roles counted.", rich_help_panel=LENGTH)] = 100,
    checkpointing_steps: Annotated[int, typer.Option(help="Generator updates between checkpoints.", rich_help_panel=LENGTH)] = 50,
    resume_from_checkpoint: Annotated[str | None, typer.Option(help="A checkpoint folder, or latest (a new run where there is none yet).", show_default="a new run", rich_help_panel=LENGTH)] = None,
    save_precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of the final LoRA files (checkpoints are fp32).", rich_help_panel=LENGTH)] = "bf16",

    denoising_step_indices_list: Annotated[str, typer.Option(help="The student's steps, before the shift, in thousandths.", rich_help_panel=DMD)] = "1000,750,500,250",
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=DMD)] = None,
    recipe: Annotated[Literal["corrected", "seed"], typer.Option(help="seed is VideoX-Fun's maths, for comparison: either expert walks all steps, from noise, and score levels have no cap and no floor.", rich_help_panel=DMD)] = "corrected",
    start: Annotated[Literal["latents", "noise"] | None, typer.Option(help="Rollouts start from cached latents noised to the expert's first step, or from pure noise at the first of all steps, as in VideoX-Fun.", show_default="latents for low, else noise", rich_help_panel=DMD)] = None,
    pairing: Annotated[Literal["renoise", "euler"], typer.Option(help="How a step leads to the next; sample with the same (LCM or Euler).", rich_help_panel=DMD)] = "renoise",
    score_floor: Annotated[Literal["boundary", "handover"], typer.Option(help="Where the high expert's score levels end: the model's boundary or the student's hand-over step.", rich_help_panel=DMD)] = "boundary",
    real_guidance_scale: Annotated[float, typer.Option(help="CFG scale of the teacher, with the cached negative prompt; 0 or 1 is no guidance.", rich_help_panel=DMD)] = 6.0,
    fake_guidance_scale: Annotated[float, typer.Option(help="CFG scale of the critic; 0 is no guidance.", rich_help_panel=DMD)] = 0.0,
    gen_update_interval: Annotated[int, typer.Option(help="Critic updates before each generator update.", rich_help_panel=DMD)] = 5,

    rank: Annotated[int, typer.Option(help="Dimension of the LoRA matrices.", rich_help_panel=LORA)] = 64,
    network_alpha: Annotated[float, typer.Option(help="LoRA scale: applied as alpha / rank.", rich_help_panel=LORA)] = 32,
    target_name: Annotated[str, typer.Option(help="Layers of each block that get a LoRA, Wan's or diffusers' names, by comma.", rich_help_panel=LORA)] = "q,k,v,ffn.0,ffn.2",
    learning_rate: Annotated[float, typer.Option(help="AdamW rate of the generator.", rich_help_panel=LORA)] = 1e-5,
    learning_rate_critic: Annotated[float, typer.Option(help="AdamW rate of the critic.", rich_help_panel=LORA)] = 1e-6,
    lr_warmup_steps: Annotated[int, typer.Option(help="Updates of a role over which its rate rises from 0.", rich_help_panel=LORA)] = 0,
    adam_beta1: Annotated[float, typer.Option(help="Decay of the mean gradient, both roles.", rich_help_panel=LORA)] = 0.9,
    adam_beta2: Annotated[float, typer.Option(help="Decay of the mean squared gradient.", rich_help_panel=LORA)] = 0.999,
    adam_weight_decay: Annotated[float, typer.Option(help="AdamW weight decay, times the rate, each update.", rich_help_panel=LORA)] = 3e-2,
    adam_epsilon: Annotated[float, typer.Option(help="Added to the root of the mean squared gradient.", rich_help_panel=LORA)] = 1e-10,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm, each role's on its own.", rich_help_panel=LORA)] = 0.05,

    train_batch_size: Annotated[int, typer.Option(help="Samples in one pass.", rich_help_panel=DATA)] = 1,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Passes in one update.", rich_help_panel=DATA)] = 1,
    video_repeat: Annotated[int, typer.Option(help="Times that a video occurs in an epoch (an image: once).", rich_help_panel=DATA)] = 1,
    caption_dropout: Annotated[float, typer.Option(help="Share of captions replaced by the empty prompt.", rich_help_panel=DATA)] = 0.1,
    tail: Annotated[Literal["pad", "drop"], typer.Option(help="A bucket's last batch: filled with its samples again, or left out.", rich_help_panel=DATA)] = "pad",
    dataloader_num_workers: Annotated[int, typer.Option(help="Threads that read ahead; 0 reads in the loop.", rich_help_panel=DATA)] = 8,

    mixed_precision: Annotated[Literal["bf16", "no"], typer.Option(help="Base and compute in bf16 (LoRA stays fp32), or all in fp32.", rich_help_panel=DEVICE)] = "bf16",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute blocks in backward: far less memory, a third more time.", rich_help_panel=DEVICE)] = True,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu …; auto takes a GPU where there is one.", rich_help_panel=DEVICE)] = "auto",
) -> None:
    """Distil a few-step LoRA of one expert from shards (DMD).

    Ends at --max-train-steps or --num-train-epochs. SIGTERM and Ctrl-C leave a checkpoint and a loadable LoRA. One update is one optimizer step of one role. Next: wantrain sample --lora LORA.
    """

    from rich.console import Console

    from train.config import DistillConfig
    from train.loop import distill as train
    from train.run import prepare, resolved_configuration

    config = DistillConfig(
        model=model,
        shards=shards,
        output_dir=output_dir,
        boundary_type=boundary_type,
        seed=seed,
        max_train_steps=max_train_steps,
        num_train_epochs=num_train_epochs,
        checkpointing_steps=checkpointing_steps,
        resume_from_checkpoint=resume_from_checkpoint,
        save_precision=save_precision,
        denoising_step_indices_list=_numbers(
            denoising_step_indices_list, "--denoising-step-indices-list"
        ),
        flow_shift=flow_shift,
        recipe=recipe,
        start=start,
        pairing=pairing,
        score_floor=score_floor,
        real_guidance_scale=real_guidance_scale,
        fake_guidance_scale=fake_guidance_scale,
        gen_update_interval=gen_update_interval,
        rank=rank,
        network_alpha=network_alpha,
        target_name=tuple(name for name in target_name.replace(",", " ").split()),
        learning_rate=learning_rate,
        learning_rate_critic=learning_rate_critic,
        lr_warmup_steps=lr_warmup_steps,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        adam_weight_decay=adam_weight_decay,
        adam_epsilon=adam_epsilon,
        max_grad_norm=max_grad_norm,
        train_batch_size=train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        video_repeat=video_repeat,
        caption_dropout=caption_dropout,
        tail=tail,
        dataloader_num_workers=dataloader_num_workers,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        device=default_device() if device == "auto" else device,
    )
    console = Console(stderr=True)
    if dry_run:
        planned = prepare(config)
        print(resolved_configuration(planned))
        for line in planned.describe():
            print(line)
        return
    stopped_by = train(config, console)
    if stopped_by is not None:
        console.print(
            "stopped  by a signal; go on with the same command and --resume-from-checkpoint latest",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(128 + stopped_by)


@app.command(cls=HelpPage, epilog=SAMPLE_EXAMPLES)
def sample(
    prompt: Annotated[list[str], typer.Option(help="What to show; may be given several times.", rich_help_panel=SAMPLE)],
    model: Model = DEFAULT_MODEL,
    lora: Annotated[list[Path] | None, typer.Option(help="LoRA file of `wantrain distill`; twice for a high and a low one. The file says which expert it is.", show_default="none: give --teacher", rich_help_panel=SAMPLE)] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for i2v models; resized to cover and centre-cropped.", show_default="none", rich_help_panel=SAMPLE)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the clips (mp4) and the contact sheet (png).", rich_help_panel=SAMPLE)] = Path("samples"),
    teacher: Annotated[bool, typer.Option("--teacher", help="Sample the base model itself: many steps, CFG, no LoRA.", rich_help_panel=SAMPLE)] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of --teacher; a student takes the steps it was trained on.", show_default="40", rich_help_panel=SAMPLE)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="CFG scale of --teacher; a student needs none.", show_default="5", rich_help_panel=SAMPLE)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt of --teacher.", show_default="Wan's published one", rich_help_panel=SAMPLE)] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of --teacher.", show_default="the shift that a student of this model is trained with", rich_help_panel=SAMPLE)] = None,
    height: Annotated[int, typer.Option(help="Height in pixels, a multiple of 16.", rich_help_panel=SAMPLE)] = 480,
    width: Annotated[int, typer.Option(help="Width in pixels, a multiple of 16.", rich_help_panel=SAMPLE)] = 832,
    num_frames: Annotated[int, typer.Option(help="Frames, 4n+1.", rich_help_panel=SAMPLE)] = 81,
    fps: Annotated[int, typer.Option(help="Frames per second of the mp4 (Wan is trained at 16).", rich_help_panel=SAMPLE)] = 16,
    seed: Annotated[int, typer.Option(help="Decides the noise of every prompt.", rich_help_panel=SAMPLE)] = 42,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of transformers and text encoder (the VAE is fp32).", rich_help_panel=DEVICE)] = "bf16",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu …; auto takes a GPU where there is one.", rich_help_panel=DEVICE)] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep in GPU memory only the component that works (diffusers' model offloading).", rich_help_panel=DEVICE)] = False,
) -> None:
    """Make clips with the LoRAs, on exactly the timesteps that they were trained on.

    Clips are mp4 files, with a contact sheet beside them. Two experts need two LoRAs; they must agree on their steps.
    """
    from rich.console import Console

    from train.sample import SampleConfig, sample_clips

    config = SampleConfig(
        model=model,
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
        offload=offload,
    )
    sample_clips(config, Console(stderr=True))


# fmt: on
def main() -> None:
    """Console script `wantrain`."""
    run(app)


if __name__ == "__main__":
    main()
