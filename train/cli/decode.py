"""`wantrain decode` on the command line."""

import typer

from train.sampling.config import DecodeConfig


def decode(config: DecodeConfig, _: typer.Context) -> None:
    r"""Decode the clips.

    Examples:
        # what the students of Wan2.2-I2V-A14B made after 50 updates
        wantrain decode --latents output_dir_distill/low/validation/step-50

        # all validations of a run, one below the other
        wantrain decode --latents output_dir_distill/low/validation --output all-steps

        # the bundled toy model, on samples of its shards
        wantrain distill --model toy --shards toy-shards --output-dir toy-watched \
            --boundary-type full --start latents --max-train-steps 1 --rank 8 \
            --validation-steps 1
        wantrain decode --model toy --latents toy-watched/validation \
            --output toy-decoded
    """
    from rich.console import Console

    from train.sampling.decode import decode_clips

    decode_clips(config, Console(stderr=True))
