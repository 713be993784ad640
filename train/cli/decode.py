"""`wantrain decode` on the command line."""

import typer

from shared.cli.config_command import add_config_command
from train.sampling.config import DecodeConfig

DECODE_EXAMPLES = """
# what the students of Wan2.2-I2V-A14B made after 50 updates
wantrain decode --latents output_dir_distill/validation/step-50

# all validations of a run, one below the other
wantrain decode --latents output_dir_distill/validation --output all-steps

# the bundled toy model, on samples of its shards
wantrain distill --model toy --shards toy-shards --output-dir toy-watched \\
    --boundary-type full --start latents --max-train-steps 1 --rank 8 \\
    --validation-steps 1
wantrain decode --model toy --latents toy-watched/validation \\
    --output toy-decoded
"""


def decode(config: DecodeConfig, _: typer.Context) -> None:
    """Decode the clips."""
    from rich.console import Console

    from train.sampling.decode import decode_clips

    decode_clips(config, Console(stderr=True))


def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    add_config_command(app, "decode", DecodeConfig, decode, examples=DECODE_EXAMPLES)
