"""`wantrain distill` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.videox_fun_command import Given, SeedCommand, with_seed_flags
from shared.errors import UserError
from shared.io.mirror import DEFAULT_SHARD_CACHE_GB, limit_shard_cache
from shared.models.spec import DEFAULT_MODEL
from train.cli import options as option
from train.cli.options import DEVICE, OPTIMIZER

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

DMD = "Distillation"


def _numbers(text: str, option: str) -> tuple[float, ...]:
    """ "1000 750" or "1000,750" → (1000.0, 750.0)."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise UserError(f"{option}: found {text!r}, expected numbers such as 1000,750.") from error


# fmt: off
def distill(
    model: option.Model = DEFAULT_MODEL,
    transformer_path: option.TransformerPath = None,
    base_lora: option.BaseLora = None,
    shards: option.Shards = option.DEFAULT_SHARDS,
    where: option.Where = option.ALL_SAMPLES,
    shard_cache_gb: option.ShardCacheGb = DEFAULT_SHARD_CACHE_GB,
    captions: option.Captions = None,
    boundary_type: option.BoundaryType = None,
    train_mode: option.TrainMode = None,
    seed: option.Seed = 42,

    output_dir: option.OutputDir = Path("output_dir_distill"),
    save_precision: option.SavePrecision = "bf16",
    dry_run: option.DryRun = False,

    max_train_steps: option.MaxTrainSteps = None,
    num_train_epochs: option.NumTrainEpochs = 100,
    checkpointing_steps: option.CheckpointingSteps = 50,
    checkpoints_total_limit: option.CheckpointsTotalLimit = None,
    resume_from_checkpoint: option.ResumeFromCheckpoint = None,

    validation_steps: option.ValidationSteps = None,
    report_to: option.ReportTo = "tensorboard",
    logging_dir: option.LoggingDir = None,
    tracker_project_name: option.TrackerProjectName = "wandistill",

    denoising_step_indices_list: Annotated[str, typer.Option(metavar="LIST", help="The student's steps, as timesteps before the shift: 1000 is pure noise, 0 the clip.", rich_help_panel=DMD)] = "1000,750,500,250",
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: timestep 1000*u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=DMD)] = None,
    recipe: Annotated[Literal["corrected", "seed"], typer.Option(help="seed is VideoX-Fun's maths, for comparison: either expert walks all steps, from noise, and score levels have no cap and no floor.", rich_help_panel=DMD)] = "corrected",
    start: Annotated[Literal["latents", "noise"] | None, typer.Option(help="Rollouts start from cached latents noised to the expert's first step, or from pure noise at the first of all steps, as in VideoX-Fun.", show_default="latents for low, else noise", rich_help_panel=DMD)] = None,
    pairing: Annotated[Literal["renoise", "euler"], typer.Option(help="How one step leads to the next: with fresh noise (sample with LCM) or along the velocity (sample with Euler).", rich_help_panel=DMD)] = "renoise",
    score_floor: Annotated[Literal["boundary", "handover"], typer.Option(help="Where the high-noise expert's score levels end: at the model's boundary or at the first step of the low-noise expert.", rich_help_panel=DMD)] = "boundary",
    uniform_sampling: Annotated[bool, typer.Option(help="Spread the score levels of an update's samples evenly over the expert's interval, instead of drawing each by itself; the same with one sample an update.", show_default="on", rich_help_panel=DMD)] = True,
    real_guidance_scale: Annotated[float, typer.Option(metavar="X", help="CFG scale of the teacher, with the cached negative prompt; 0 or 1 is no guidance.", rich_help_panel=DMD)] = 6.0,
    fake_guidance_scale: Annotated[float, typer.Option(metavar="X", help="CFG scale of the critic; 0 is no guidance.", rich_help_panel=DMD)] = 0.0,
    gen_update_interval: Annotated[int, typer.Option(metavar="N", help="Critic updates before each generator update.", rich_help_panel=DMD)] = 5,
    fm_loss_weight: Annotated[float, typer.Option(metavar="X", help="Add flow matching on the cached latents, times this, to the generator's loss; 0 is DMD alone.", rich_help_panel=DMD)] = 0.0,

    init_lora: option.InitLora = None,
    rank: option.Rank = 64,
    network_alpha: option.NetworkAlpha = 32,
    target_name: option.TargetName = "q,k,v,ffn.0,ffn.2",
    lora_skip_name: option.LoraSkipName = "",
    ema_decay: option.EmaDecay = 0.0,
    ema_start: option.EmaStart = 100,

    learning_rate: option.LearningRate = 1e-5,
    learning_rate_critic: Annotated[float, typer.Option(metavar="X", help="Learning rate of the critic.", rich_help_panel=OPTIMIZER)] = 1e-6,
    lr_scheduler: option.LrScheduler = "constant",
    lr_warmup_steps: option.LrWarmupSteps = 0,
    adam_beta1: option.AdamBeta1 = 0.9,
    adam_beta2: option.AdamBeta2 = 0.999,
    adam_weight_decay: option.AdamWeightDecay = 3e-2,
    adam_epsilon: option.AdamEpsilon = 1e-10,
    use_8bit_adam: option.Use8bitAdam = False,
    max_grad_norm: option.MaxGradNorm = 0.05,

    train_batch_size: option.TrainBatchSize = 1,
    gradient_accumulation_steps: option.GradientAccumulationSteps = 1,
    video_repeat: option.VideoRepeat = None,
    caption_dropout: option.CaptionDropout = 0.1,
    random_frame_crop: option.RandomFrameCrop = False,
    tail: option.Tail = "pad",
    dataloader_num_workers: option.DataloaderNumWorkers = 8,

    mixed_precision: option.MixedPrecision = "bf16",
    base_precision: option.BasePrecision = None,
    gradient_checkpointing: option.GradientCheckpointing = True,
    low_vram: option.LowVram = False,
    blocks_to_swap: option.BlocksToSwap = None,
    activation_offloading: option.ActivationOffloading = False,
    allow_tf32: option.AllowTf32 = False,
    compile: option.Compile = False,
    attention_backend: option.AttentionBackend = "native",
    batched_guidance: Annotated[bool, typer.Option(help="Compute the guided teacher (and critic) with and without caption in one pass of both: half the communication under fsdp and zero3, for twice the memory of a pass without gradients.", show_default="off", rich_help_panel=DEVICE)] = False,
    device: option.Device = "auto",

    strategy: option.Strategy = None,
    num_processes: option.NumProcesses = None,
    num_machines: option.NumMachines = 1,
    machine_rank: option.MachineRank = 0,
    main_process_ip: option.MainProcessIp = "127.0.0.1",
    main_process_port: option.MainProcessPort = None,
    ddp_timeout: option.DdpTimeout = 1200,
    given_elsewhere: Given | None = None,
) -> None:
    """Distil a few-step LoRA of one expert from shards (DMD).

    The student (generator) learns to do in a few steps what the base model (teacher) does in many with CFG; a critic, a second LoRA, follows the student. One update is one optimizer step of one of the two. SIGTERM and Ctrl-C leave a checkpoint and a loadable LoRA.

    Next: wantrain sample --lora FILE --prompt TEXT
    """
    options = locals()  # as they were given

    from train.cli.execute import carry_out, configured
    from train.config import DistillConfig
    from train.prepare import prepare_distillation

    limit_shard_cache(shard_cache_gb)
    steps = _numbers(denoising_step_indices_list, "--denoising-step-indices-list")
    config = configured(DistillConfig, options, denoising_step_indices_list=steps)
    carry_out(prepare_distillation(config), dry_run=dry_run)


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=SeedCommand, epilog=DISTILL_EXAMPLES)(with_seed_flags(distill))
