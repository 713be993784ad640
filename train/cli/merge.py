"""`wantrain merge` on the command line."""

import typer

from shared.cli.config_command import add_config_command
from train.saving.config import MergeConfig

MERGE_EXAMPLES = """
# Wan2.2-I2V-A14B with the LoRAs of both experts in its weights
wantrain merge --lora output_dir_high/lora-high-diffusers.safetensors \\
    --lora output_dir_distill/lora-low-diffusers.safetensors \\
    --output Wan2.2-I2V-A14B-4steps

# another trainer's LoRA for the low-noise expert, at 0.8 of its strength
wantrain merge --lora style.safetensors --boundary-type low --lora-scale 0.8 \\
    --output Wan2.2-I2V-A14B-style

# the bundled toy model with its LoRA of `wantrain distill`
wantrain merge --model toy --lora toy-lora/lora-full-diffusers.safetensors \\
    --output toy-merged
"""


def merge(config: MergeConfig, _: typer.Context) -> None:
    """Write the merged model."""
    from rich.console import Console

    from train.saving import merge as merging

    merging.merge(config, Console(stderr=True))


def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    add_config_command(app, "merge", MergeConfig, merge, examples=MERGE_EXAMPLES)
