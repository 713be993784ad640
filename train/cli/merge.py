"""`wantrain merge` on the command line."""

import typer

from train.saving.config import MergeConfig


def merge(config: MergeConfig, _: typer.Context) -> None:
    r"""Write the merged model.

    Examples:
        # Wan2.2-I2V-A14B with the LoRAs of both experts in its weights
        wantrain merge \
            --lora output_dir_distill/high/lora-high-diffusers.safetensors \
            --lora output_dir_distill/low/lora-low-diffusers.safetensors \
            --output Wan2.2-I2V-A14B-4steps

        # another trainer's LoRA for the low-noise expert, at 0.8 of its strength
        wantrain merge --lora style.safetensors --boundary-type low --lora-scale 0.8 \
            --output Wan2.2-I2V-A14B-style

        # the bundled toy model with its LoRA of `wantrain distill`
        wantrain merge --model toy --lora toy-lora/lora-full-diffusers.safetensors \
            --output toy-merged
    """
    from rich.console import Console

    from train.saving import merge as merging

    merging.merge(config, Console(stderr=True))
