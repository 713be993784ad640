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

        # making clips with the base model: passes and bytes of a clip, too
        wantrain plan --model wan2.2-t2v-a14b --method synthesize --gpu-memory 48

        # the bundled toy model, and all in bytes
        wantrain plan --model toy --fix-sample-size 64 96 --frames 17 --rank 8 --json
    """
    from dataclasses import asdict, replace

    from shared.format.buckets import Bucket
    from train.distributed.placement import strategy_for
    from train.memory.estimate import Settings
    from train.memory.plan import plan_memory
    from train.synthesis.sampler import clip_cost

    settings = Settings(
        samples=config.train_batch_size,
        rank=config.rank,
        target_name=names(config.target_name),
        lora_skip_name=names(config.lora_skip_name),
        roles={"distill": 2, "regression": 1, "lora": 1, "synthesize": 0}[config.method],
        average=config.ema_decay > 0,
        processes=config.num_processes,
        memory=replace(config, strategy=strategy_for(config.num_processes, config.strategy)),
    )
    bucket = Bucket(*config.fix_sample_size, config.video_sample_n_frames)
    planned = plan_memory(config.model, bucket, settings)
    cost = clip_cost(planned.spec, bucket) if config.method == "synthesize" else None
    if config.json:
        said = planned.to_json(config.gpu_memory) | (asdict(cost) if cost else {})
        echo_data(json.dumps(said, indent=1))
        return
    echo("\n".join(planned.lines(config.gpu_memory)))
    if cost:
        echo(f"\n{cost.line()}")
