"""`wantrain plan` on the command line."""

import json as json_format
from typing import Annotated, Literal

import typer

from shared.cli.support import Command, echo, echo_data
from shared.models.spec import DEFAULT_MODEL
from train.cli import options as option
from train.cli.options import DATA, INPUT, OUTPUT

PLAN_EXAMPLES = """
# what a LoRA of Wan2.2-I2V-A14B needs at 480P, and what fits a card of 24 GiB
wantrain plan --gpu-memory 24

# on eight GPUs that share the base
wantrain plan --model wan2.2-t2v-a14b --strategy fsdp --num-processes 8

# a smaller model with larger clips
wantrain plan --model wan2.1-t2v-1.3b --fix-sample-size 720 1280

# the bundled toy model, and all in bytes
wantrain plan --model toy --fix-sample-size 64 96 --frames 17 --rank 8 --json
"""


# fmt: off
def plan(
    model: option.Model = DEFAULT_MODEL,
    fix_sample_size: Annotated[tuple[int, int], typer.Option(metavar="H W", help="Height and width of the clips, in pixels.", rich_help_panel=DATA)] = (480, 832),
    video_sample_n_frames: Annotated[int, typer.Option("--video-sample-n-frames", "--frames", metavar="N", min=1, help="Frames of the clips: 1, 5, 9 and so on.", rich_help_panel=DATA)] = 81,
    method: Annotated[Literal["distill", "lora"], typer.Option(help="Which command the plan is of.", rich_help_panel=INPUT)] = "distill",
    gpu_memory: Annotated[float | None, typer.Option(metavar="GiB", min=0, help="Memory of a GPU, to be told what fits.", show_default="not asked", rich_help_panel=INPUT)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON, in bytes.", show_default="off", rich_help_panel=OUTPUT)] = False,
    rank: option.Rank = 64,
    target_name: option.TargetName = "q,k,v,ffn.0,ffn.2",
    lora_skip_name: option.LoraSkipName = "",
    ema_decay: option.EmaDecay = 0.0,
    use_8bit_adam: option.Use8bitAdam = False,
    train_batch_size: option.TrainBatchSize = 1,
    mixed_precision: option.MixedPrecision = "bf16",
    base_precision: option.BasePrecision = None,
    gradient_checkpointing: option.GradientCheckpointing = True,
    low_vram: option.LowVram = False,
    blocks_to_swap: option.BlocksToSwap = None,
    activation_offloading: option.ActivationOffloading = False,
    strategy: Annotated[Literal["single", "ddp", "zero2", "zero3", "fsdp"] | None, typer.Option(help="How processes share the work: ddp keeps the whole model in each; fsdp and zero3 shard it across them, zero2 only the optimizer.", show_default="ddp for several processes, single for one", rich_help_panel=option.PROCESSES)] = None,
    num_processes: Annotated[int, typer.Option(metavar="N", min=1, help="Processes of the run over all machines, one for a GPU.", rich_help_panel=option.PROCESSES)] = 1,
) -> None:
    """Estimate the GPU memory that a run needs.

    And what would make it less. From configs alone: those of the published Wan models are built in, by name (wan2.2-i2v-a14b, wan2.1-t2v-1.3b and so on) or hub id; nothing is downloaded or loaded, and no shards are needed. All is of one process. What is counted are tensors: leave 1 or 2 GiB for CUDA's own.

    Next: wantrain distill, with the same options
    """
    options = locals()  # as they were given

    from shared.format.buckets import Bucket
    from train.distributed.placement import strategy_for
    from train.memory.estimate import Settings
    from train.memory.options import MemoryOptions
    from train.memory.plan import plan_memory

    settings = Settings(
        samples=train_batch_size,
        rank=rank,
        target_name=option.names(target_name),
        lora_skip_name=option.names(lora_skip_name),
        roles=2 if method == "distill" else 1,
        average=ema_decay > 0,
        processes=num_processes,
        memory=MemoryOptions.of(options, strategy_for(num_processes, strategy)),
    )
    planned = plan_memory(model, Bucket(*fix_sample_size, video_sample_n_frames), settings)
    if json:
        echo_data(json_format.dumps(planned.to_json(gpu_memory), indent=1))
        return
    for line in planned.lines(gpu_memory):
        echo(line)


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=Command, epilog=PLAN_EXAMPLES)(plan)
