"""`wantrain distill` on the command line."""

import typer

from shared.cli.config_command import add_config_command
from shared.cli.videox_fun_command import VideoXFunCommand, given_elsewhere
from train.config import DistillConfig

DISTILL_EXAMPLES = """
# the low-noise expert of Wan2.2-I2V-A14B, from shards/
wantrain distill

# the high-noise expert: a dry run, 500 generator updates, 500 more
wantrain distill --boundary-type high --output-dir output_dir_high --dry-run
wantrain distill --boundary-type high --output-dir output_dir_high \\
    --max-train-steps 500
wantrain distill --boundary-type high --output-dir output_dir_high \\
    --max-train-steps 1000 --resume-from-checkpoint latest

# the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
wantrain distill --model toy --shards toy-shards --output-dir toy-lora \\
    --boundary-type full --max-train-steps 1 --train-batch-size 2 --rank 8
"""


def distill(config: DistillConfig, context: typer.Context) -> None:
    """Train on the shards, or print what would be done."""
    from train.cli.execute import carry_out
    from train.prepare import prepare_distillation

    carry_out(prepare_distillation(config, given_elsewhere(context)))


def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    add_config_command(
        app, "distill", DistillConfig, distill, cls=VideoXFunCommand, examples=DISTILL_EXAMPLES
    )
