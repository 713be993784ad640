"""`wantrain plan` on the command line."""

import json

import typer

from shared.cli.support import echo, echo_data
from train.config import PlanConfig
from train.options import names


def plan(config: PlanConfig, _: typer.Context) -> None:
    """Print what a run with these options would need.

    Examples:
        # what a LoRA of Wan2.2-I2V-A14B needs at 480P, and what fits 24 GiB
        wantrain plan --gpu-memory 24

        # on eight GPUs that share the base
        wantrain plan --model wan2.2-t2v-a14b --strategy fsdp --num-processes 8

        # a smaller model with larger clips
        wantrain plan --model wan2.1-t2v-1.3b --fix-sample-size 720 1280

        # the bundled toy model, and all in bytes
        wantrain plan --model toy --fix-sample-size 64 96 --frames 17 --rank 8 --json
    """
    from dataclasses import replace

    from shared.format.buckets import Bucket
    from train.distributed.placement import strategy_for
    from train.memory.estimate import Settings
    from train.memory.plan import plan_memory

    settings = Settings(
        samples=config.train_batch_size,
        rank=config.rank,
        target_name=names(config.target_name),
        lora_skip_name=names(config.lora_skip_name),
        roles=2 if config.method == "distill" else 1,
        average=config.ema_decay > 0,
        processes=config.num_processes,
        memory=replace(config, strategy=strategy_for(config.num_processes, config.strategy)),
    )
    bucket = Bucket(*config.fix_sample_size, config.video_sample_n_frames)
    planned = plan_memory(config.model, bucket, settings)
    if config.json:
        echo_data(json.dumps(planned.to_json(config.gpu_memory), indent=1))
        return
    for line in planned.lines(config.gpu_memory):
        echo(line)
