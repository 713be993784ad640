"""`wantrain lora` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.videox_fun_command import Given, SeedCommand, with_seed_flags
from shared.io.mirror import DEFAULT_SHARD_CACHE_GB, limit_shard_cache
from shared.models.spec import DEFAULT_MODEL
from train.cli import options as option

LORA_EXAMPLES = """
# the low-noise expert of Wan2.2-I2V-A14B, from shards/, 20 epochs
wantrain lora --num-train-epochs 20

# the high-noise expert, 1000 updates; what would be done, then do it
wantrain lora --boundary-type high --output-dir output_dir_lora_high \\
    --max-train-steps 1000 --dry-run
wantrain lora --boundary-type high --output-dir output_dir_lora_high \\
    --max-train-steps 1000

# more of the middle levels, as musubi-tuner and diffusion-pipe draw them
wantrain lora --timestep-sampling logit-normal

# the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
wantrain lora --model toy --shards toy-shards --output-dir toy-plain-lora \\
    --boundary-type full --max-train-steps 2 --train-batch-size 2 --rank 8
"""

LEVELS = "Noise levels"


# fmt: off
def lora(
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

    output_dir: option.OutputDir = Path("output_dir_lora"),
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

    timestep_sampling: Annotated[Literal["uniform", "logit-normal"], typer.Option(help="How noise levels are drawn, before the shift and inside the expert's range: evenly, or mostly middle ones (the sigmoid of a normal).", rich_help_panel=LEVELS)] = "uniform",
    logit_mean: Annotated[float | None, typer.Option(metavar="X", help="Mean of that normal; above 0 is noisier.", show_default="0", rich_help_panel=LEVELS)] = None,
    logit_std: Annotated[float | None, typer.Option(metavar="X", help="Standard deviation of that normal.", show_default="1", rich_help_panel=LEVELS)] = None,
    uniform_sampling: Annotated[bool, typer.Option(help="Spread the levels of an update's samples evenly over that distribution, instead of drawing each by itself; the same with one sample an update.", show_default="on", rich_help_panel=LEVELS)] = True,
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: what was drawn as u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=LEVELS)] = None,

    init_lora: option.InitLora = None,
    rank: option.Rank = 64,
    network_alpha: option.NetworkAlpha = 32,
    target_name: option.TargetName = "q,k,v,ffn.0,ffn.2",
    lora_skip_name: option.LoraSkipName = "",
    ema_decay: option.EmaDecay = 0.0,
    ema_start: option.EmaStart = 100,

    learning_rate: option.LearningRate = 1e-4,
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
    """Train a plain LoRA of one expert on clips in shards.

    What the base model does not know, such as a character, a style or a motion, is learned from the clips by flow matching; steps and CFG stay those of the base model. SIGTERM and Ctrl-C leave a checkpoint and a loadable LoRA.

    Next: wantrain sample --lora FILE --prompt TEXT
    """
    options = locals()  # as they were given

    from train.cli.execute import carry_out, configured
    from train.config import FinetuneConfig
    from train.prepare import prepare_finetuning

    limit_shard_cache(shard_cache_gb)
    config = configured(FinetuneConfig, options)
    carry_out(prepare_finetuning(config), dry_run=dry_run)


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=SeedCommand, epilog=LORA_EXAMPLES)(with_seed_flags(lora))
