"""`wantrain lora` on the command line."""

import typer

from shared.cli.videox_fun_command import given_elsewhere
from train.config import FinetuneConfig


def lora(config: FinetuneConfig, context: typer.Context) -> None:
    r"""Train on the shards, or print what would be done.

    Examples:
        # both experts of Wan2.2-I2V-A14B, from shards/, 20 epochs each:
        # output_dir_lora/high, output_dir_lora/low
        wantrain lora --num-train-epochs 20

        # the low-noise expert alone
        wantrain lora --boundary-type low --output-dir output_dir_lora_low

        # the high-noise expert, 1000 updates: a dry run, then the run
        wantrain lora --boundary-type high --output-dir output_dir_lora_high \
            --max-train-steps 1000 --dry-run
        wantrain lora --boundary-type high --output-dir output_dir_lora_high \
            --max-train-steps 1000

        # more middle levels, as in musubi-tuner and diffusion-pipe
        wantrain lora --timestep-sampling logit-normal

        # the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
        wantrain lora --model toy --shards toy-shards --output-dir toy-plain-lora \
            --boundary-type full --max-train-steps 2 --train-batch-size 2 --rank 8
    """
    from functools import partial

    from train.cli.execute import carry_out_all
    from train.prepare import prepare_finetuning

    prepare = partial(prepare_finetuning, given_elsewhere=given_elsewhere(context))
    carry_out_all(config, prepare)
