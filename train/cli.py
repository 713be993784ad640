"""The command line of stage two."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli_support import Command, echo, new_app, run
from shared.device import default_device
from shared.errors import UserError
from shared.mirror import DEFAULT_SHARD_CACHE_GB, limit_shard_cache, shards_to_read
from shared.model_spec import DEFAULT_MODEL

PROGRAM_EXAMPLES = """
# a LoRA of Wan2.2-I2V-A14B's low-noise expert, then a clip with it
wantrain distill
wantrain sample --lora output_dir_distill/lora-low-diffusers.safetensors \\
    --image frame.png --prompt "a cat turns its head"

# everything that a command takes
wantrain distill --help
"""
DISTILL_EXAMPLES = """
# the low-noise expert of Wan2.2-I2V-A14B, from shards/
wantrain distill

# the high-noise expert: what would be done, 500 generator updates, 500 more
wantrain distill --boundary-type high --output-dir output_dir_high --dry-run
wantrain distill --boundary-type high --output-dir output_dir_high \\
    --max-train-steps 500
wantrain distill --boundary-type high --output-dir output_dir_high \\
    --max-train-steps 1000 --resume-from-checkpoint latest

# the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
wantrain distill --model toy --shards toy-shards --output-dir toy-lora \\
    --boundary-type full --max-train-steps 1 --train-batch-size 2 --rank 8
"""
SAMPLE_EXAMPLES = """
# Wan2.2-I2V-A14B itself, for comparison: 40 steps with CFG
wantrain sample --teacher --image frame.png --prompt "a cat turns its head"

# Wan2.2-I2V-A14B with the LoRAs of both experts, in 4 steps
wantrain sample --lora output_dir_high/lora-high-diffusers.safetensors \\
    --lora output_dir_distill/lora-low-diffusers.safetensors \\
    --image frame.png --prompt "a cat turns its head"

# the bundled toy model with its LoRA of `wantrain distill`, seconds on a CPU
wantrain sample --model toy --lora toy-lora/lora-full-diffusers.safetensors \\
    --height 64 --width 64 --num-frames 17 --output toy-samples \\
    --prompt "a red circle moving left"
"""

app = new_app(
    "Distil few-step LoRAs of Wan models from shards, and sample with them.", PROGRAM_EXAMPLES
)

INPUT, OUTPUT, LENGTH, DMD, LORA, OPTIMIZER, DATA, SHOWN, MODEL, CLIP, TEACHER, DEVICE = (
    "Input",
    "Output",
    "Length and checkpoints",
    "Distillation",
    "LoRA",
    "Optimizer (AdamW)",
    "Data",
    "What to show",
    "Model",
    "Clip",
    "The base model instead",
    "Device",
)


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
@app.command(cls=Command, epilog=DISTILL_EXAMPLES)
def distill(
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that is distilled: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL,
    shards: Annotated[Path, typer.Option(parser=shards_to_read, metavar="DIR|URL", help="Folder of shards that `wanprep encode` made.", rich_help_panel=INPUT)] = Path("shards"),
    shard_cache_gb: Annotated[float, typer.Option(metavar="GB", help="Room on this machine for whole shards of an object store (s3://bucket/shards); what is beyond is read sample by sample.", rich_help_panel=INPUT)] = DEFAULT_SHARD_CACHE_GB,
    captions: Annotated[str | None, typer.Option(metavar="NAME", help="Captions that `wanprep recaption --name NAME` made, in place of the shards' own.", show_default="the shards' own", rich_help_panel=INPUT)] = None,
    boundary_type: Annotated[Literal["low", "high", "full"] | None, typer.Option(help="Expert to train: the one for low or for high noise, or full for a model with one transformer (or one LoRA for all steps).", show_default="low where the model has two experts, else full", rich_help_panel=INPUT)] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides every random number of the run.", rich_help_panel=INPUT)] = 42,

    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints, logs and the final LoRA.", rich_help_panel=OUTPUT)] = Path("output_dir_distill"),
    save_precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of the final LoRA files (checkpoints are fp32).", rich_help_panel=OUTPUT)] = "bf16",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and the plan, then stop.", show_default="off", rich_help_panel=OUTPUT)] = False,

    max_train_steps: Annotated[int | None, typer.Option(metavar="N", help="Generator updates of the run, in place of epochs.", show_default="as many as the epochs have", rich_help_panel=LENGTH)] = None,
    num_train_epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of the run: passes over the shards, which the updates of both roles use up.", rich_help_panel=LENGTH)] = 100,
    checkpointing_steps: Annotated[int, typer.Option(metavar="N", help="Generator updates from one checkpoint to the next.", rich_help_panel=LENGTH)] = 50,
    checkpoints_total_limit: Annotated[int | None, typer.Option(metavar="N", help="Checkpoints that are kept; the oldest are deleted after each new one.", show_default="all", rich_help_panel=LENGTH)] = None,
    resume_from_checkpoint: Annotated[str | None, typer.Option(metavar="DIR|latest", help="Checkpoint to go on from: its folder, or latest (a new run where there is none yet).", show_default="a new run", rich_help_panel=LENGTH)] = None,

    denoising_step_indices_list: Annotated[str, typer.Option(metavar="LIST", help="The student's steps, as timesteps before the shift: 1000 is pure noise, 0 the clip.", rich_help_panel=DMD)] = "1000,750,500,250",
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: timestep 1000*u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=DMD)] = None,
    recipe: Annotated[Literal["corrected", "seed"], typer.Option(help="seed is VideoX-Fun's maths, for comparison: either expert walks all steps, from noise, and score levels have no cap and no floor.", rich_help_panel=DMD)] = "corrected",
    start: Annotated[Literal["latents", "noise"] | None, typer.Option(help="Rollouts start from cached latents noised to the expert's first step, or from pure noise at the first of all steps, as in VideoX-Fun.", show_default="latents for low, else noise", rich_help_panel=DMD)] = None,
    pairing: Annotated[Literal["renoise", "euler"], typer.Option(help="How one step leads to the next: with fresh noise (sample with LCM) or along the velocity (sample with Euler).", rich_help_panel=DMD)] = "renoise",
    score_floor: Annotated[Literal["boundary", "handover"], typer.Option(help="Where the high-noise expert's score levels end: at the model's boundary or at the first step of the low-noise expert.", rich_help_panel=DMD)] = "boundary",
    real_guidance_scale: Annotated[float, typer.Option(metavar="X", help="CFG scale of the teacher, with the cached negative prompt; 0 or 1 is no guidance.", rich_help_panel=DMD)] = 6.0,
    fake_guidance_scale: Annotated[float, typer.Option(metavar="X", help="CFG scale of the critic; 0 is no guidance.", rich_help_panel=DMD)] = 0.0,
    gen_update_interval: Annotated[int, typer.Option(metavar="N", help="Critic updates before each generator update.", rich_help_panel=DMD)] = 5,

    fm_loss_weight: Annotated[float, typer.Option(metavar="X", help="Add flow matching on the cached latents, times this, to the generator's loss; 0 is DMD alone.", rich_help_panel=DMD)] = 0.0,
    ema_decay: Annotated[float, typer.Option(metavar="X", help="Save the average of the LoRA over the generator's updates, of which each keeps this share, e.g. 0.99; 0 saves the last weights.", rich_help_panel=DMD)] = 0.0,
    ema_start: Annotated[int, typer.Option(metavar="N", help="Generator updates before the average of --ema-decay begins.", rich_help_panel=DMD)] = 100,

    rank: Annotated[int, typer.Option(metavar="N", help="Inner dimension of the LoRA matrices.", rich_help_panel=LORA)] = 64,
    network_alpha: Annotated[float, typer.Option(metavar="X", help="Strength of the LoRA: its output is multiplied by alpha / rank.", rich_help_panel=LORA)] = 32,
    target_name: Annotated[str, typer.Option(metavar="LIST", help="Layers of each block that get a LoRA, by Wan's or diffusers' names.", rich_help_panel=LORA)] = "q,k,v,ffn.0,ffn.2",

    learning_rate: Annotated[float, typer.Option(metavar="X", help="Learning rate of the generator.", rich_help_panel=OPTIMIZER)] = 1e-5,
    learning_rate_critic: Annotated[float, typer.Option(metavar="X", help="Learning rate of the critic.", rich_help_panel=OPTIMIZER)] = 1e-6,
    lr_warmup_steps: Annotated[int, typer.Option(metavar="N", help="Updates of a role over which its rate rises from 0.", rich_help_panel=OPTIMIZER)] = 0,
    adam_beta1: Annotated[float, typer.Option(metavar="X", help="Decay of the mean gradient per update, both roles.", rich_help_panel=OPTIMIZER)] = 0.9,
    adam_beta2: Annotated[float, typer.Option(metavar="X", help="Decay of the mean squared gradient per update.", rich_help_panel=OPTIMIZER)] = 0.999,
    adam_weight_decay: Annotated[float, typer.Option(metavar="X", help="Share of a weight, times the rate, taken off per update.", rich_help_panel=OPTIMIZER)] = 3e-2,
    adam_epsilon: Annotated[float, typer.Option(metavar="X", help="Added to the root of the mean squared gradient.", rich_help_panel=OPTIMIZER)] = 1e-10,
    max_grad_norm: Annotated[float, typer.Option(metavar="X", help="Norm to which each role's gradient is clipped.", rich_help_panel=OPTIMIZER)] = 0.05,

    train_batch_size: Annotated[int, typer.Option(metavar="N", help="Samples in one forward and backward pass.", rich_help_panel=DATA)] = 1,
    gradient_accumulation_steps: Annotated[int, typer.Option(metavar="N", help="Forward and backward passes in one update.", rich_help_panel=DATA)] = 1,
    video_repeat: Annotated[int, typer.Option(metavar="N", help="Times that a video occurs in an epoch; an image occurs once.", rich_help_panel=DATA)] = 1,
    caption_dropout: Annotated[float, typer.Option(metavar="X", help="Share of captions, 0 to 1, replaced by the empty prompt.", rich_help_panel=DATA)] = 0.1,
    random_frame_crop: Annotated[bool, typer.Option("--random-frame-crop", help="In one update of ten, show clips up to a random frame only, 4n+1 from 5 on, so that the LoRA knows shorter clips, too.", show_default="off", rich_help_panel=DATA)] = False,
    tail: Annotated[Literal["pad", "drop"], typer.Option(help="What becomes of a bucket's last, short batch: filled with its samples again, or left out.", rich_help_panel=DATA)] = "pad",
    dataloader_num_workers: Annotated[int, typer.Option(metavar="N", help="Threads that read ahead; 0 reads in the loop.", rich_help_panel=DATA)] = 8,

    mixed_precision: Annotated[Literal["bf16", "no"], typer.Option(help="Base and compute in bf16 (LoRA stays fp32), or all in fp32.", rich_help_panel=DEVICE)] = "bf16",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute blocks again in the backward pass: far less memory, a third more time.", show_default="on", rich_help_panel=DEVICE)] = True,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=DEVICE)] = "auto",
) -> None:
    """Distil a few-step LoRA of one expert from shards (DMD).

    The student (generator) learns to do in a few steps what the base model (teacher) does in many with CFG; a critic, a second LoRA, follows the student. One update is one optimizer step of one of the two. SIGTERM and Ctrl-C leave a checkpoint and a loadable LoRA.

    Next: wantrain sample --lora FILE --prompt TEXT
    """

    from rich.console import Console

    from train.config import DistillConfig
    from train.loop import distill as train
    from train.run import prepare, resolved_configuration

    limit_shard_cache(shard_cache_gb)
    config = DistillConfig(
        model=model,
        shards=shards,
        captions=captions,
        output_dir=output_dir,
        boundary_type=boundary_type,
        seed=seed,
        max_train_steps=max_train_steps,
        num_train_epochs=num_train_epochs,
        checkpointing_steps=checkpointing_steps,
        checkpoints_total_limit=checkpoints_total_limit,
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
        fm_loss_weight=fm_loss_weight,
        ema_decay=ema_decay,
        ema_start=ema_start,
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
        random_frame_crop=random_frame_crop,
        tail=tail,
        dataloader_num_workers=dataloader_num_workers,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        device=default_device() if device == "auto" else device,
    )
    console = Console(stderr=True)
    if dry_run:
        planned = prepare(config)
        echo(resolved_configuration(planned))
        for line in planned.describe():
            echo(line)
        return
    stopped_by = train(config, console)
    if stopped_by is not None:
        console.print(
            "stopped  by a signal; go on with the same command and --resume-from-checkpoint latest",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(128 + stopped_by)


@app.command(cls=Command, epilog=SAMPLE_EXAMPLES)
def sample(
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to show; one clip for each --prompt given.", rich_help_panel=SHOWN)],
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="First frame, for i2v models; resized to cover the clip and cropped at the centre.", show_default="none", rich_help_panel=SHOWN)] = None,

    lora: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="LoRA of `wantrain distill`; give it twice for a high and a low one, in any order.", show_default="none: give --teacher", rich_help_panel=MODEL)] = None,
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the LoRAs are of: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=MODEL)] = DEFAULT_MODEL,

    height: Annotated[int, typer.Option(metavar="PX", help="Height in pixels, a multiple of 16.", rich_help_panel=CLIP)] = 480,
    width: Annotated[int, typer.Option(metavar="PX", help="Width in pixels, a multiple of 16.", rich_help_panel=CLIP)] = 832,
    num_frames: Annotated[int, typer.Option(metavar="N", help="Length in frames, of the form 4n+1.", rich_help_panel=CLIP)] = 81,
    fps: Annotated[int, typer.Option(metavar="N", help="Frames per second of the mp4; Wan is trained at 16.", rich_help_panel=CLIP)] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides the noise that each clip starts from.", rich_help_panel=CLIP)] = 42,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the clips (mp4) and the contact sheet (png).", rich_help_panel=CLIP)] = Path("samples"),

    teacher: Annotated[bool, typer.Option("--teacher", help="Sample the base model itself, with many steps, CFG and no LoRA.", show_default="off", rich_help_panel=TEACHER)] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of --teacher; a student takes those it was trained on.", show_default="40", rich_help_panel=TEACHER)] = None,
    guidance_scale: Annotated[float | None, typer.Option(metavar="X", help="CFG scale of --teacher; a student needs none.", show_default="5", rich_help_panel=TEACHER)] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the CFG of --teacher leads away from.", show_default="Wan's published one", rich_help_panel=TEACHER)] = None,
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift of the noise schedule of --teacher.", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=TEACHER)] = None,

    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of transformers and text encoder (the VAE is fp32).", rich_help_panel=DEVICE)] = "bf16",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=DEVICE)] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep in GPU memory only the component that works, as diffusers' model offloading does.", show_default="off", rich_help_panel=DEVICE)] = False,
) -> None:
    """Make clips with LoRAs, or with the base model.

    LoRAs are used on exactly the timesteps that they were trained on. Two experts need two LoRAs, which must agree on their steps.

    Next: the same files in diffusers or ComfyUI, see the README.
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
