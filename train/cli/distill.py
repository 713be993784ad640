"""`wantrain distill` on the command line."""

import typer

from shared.cli.videox_fun_command import given_elsewhere
from train.config import DistillConfig


def distill(config: DistillConfig, context: typer.Context) -> None:
    r"""Train on the shards, or print what would be done.

    Examples:
        # both experts of Wan2.2-I2V-A14B, from shards/, high then low:
        # output_dir_distill/high, output_dir_distill/low
        wantrain distill

        # the low-noise expert alone
        wantrain distill --boundary-type low --output-dir output_dir_low

        # the high-noise expert: a dry run, 500 generator updates, 500 more
        wantrain distill --boundary-type high --output-dir output_dir_high --dry-run
        wantrain distill --boundary-type high --output-dir output_dir_high \
            --max-train-steps 500
        wantrain distill --boundary-type high --output-dir output_dir_high \
            --max-train-steps 1000 --resume-from-checkpoint latest

        # the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
        wantrain distill --model toy --shards toy-shards --output-dir toy-lora \
            --boundary-type full --max-train-steps 1 --train-batch-size 2 --rank 8
    """
    from functools import partial

    from train.cli.execute import carry_out_all
    from train.prepare import prepare_distillation

    prepare = partial(prepare_distillation, given_elsewhere=given_elsewhere(context))
    carry_out_all(config, prepare)
