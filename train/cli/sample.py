"""`wantrain sample` on the command line."""

import typer

from train.sampling.config import SampleConfig


def sample(config: SampleConfig, _: typer.Context) -> None:
    r"""Make the clips.

    Examples:
        # Wan2.2-I2V-A14B itself, for comparison: 40 steps with CFG
        wantrain sample --teacher --image frame.png --prompt "a cat turns its head"

        # Wan2.2-I2V-A14B with the LoRAs of both experts, in 4 steps
        wantrain sample \
            --lora output_dir_distill/high/lora-high-diffusers.safetensors \
            --lora output_dir_distill/low/lora-low-diffusers.safetensors \
            --image frame.png --prompt "a cat turns its head"

        # a LoRA of `wantrain lora`, with the base model's sampler
        wantrain sample --lora output_dir_lora_low/lora-low-diffusers.safetensors \
            --steps 30 --image frame.png --prompt "a cat turns its head"

        # the bundled toy model with its LoRA of `wantrain distill`, seconds on a CPU
        wantrain sample --model toy --lora toy-lora/lora-full-diffusers.safetensors \
            --height 64 --width 64 --num-frames 17 --output toy-samples \
            --prompt "a red circle moving left"
    """
    from rich.console import Console

    from train.sampling.sample import sample_clips

    sample_clips(config, Console(stderr=True))
