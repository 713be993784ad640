"""`wantrain evaluate` on the command line."""

import typer

from train.evaluation.config import EvaluateConfig


def evaluate(config: EvaluateConfig, _: typer.Context) -> None:
    r"""Compare the clips.

    Examples:
        # Wan2.2-I2V-A14B with the LoRAs of both experts against itself in 40 steps;
        # lines of prompts.txt: a cat turns its head --i cat.png
        wantrain evaluate \
            --lora output_dir_distill/high/lora-high-diffusers.safetensors \
            --lora output_dir_distill/low/lora-low-diffusers.safetensors \
            --prompts prompts.txt

        # clips that exist already
        wantrain evaluate --teacher-clips evaluation/teacher \
            --student-clips evaluation/student --output again

        # the bundled toy model with its LoRA of `wantrain distill`
        wantrain evaluate --model toy \
            --lora toy-lora/lora-full-diffusers.safetensors \
            --height 64 --width 64 --num-frames 17 --output toy-evaluation \
            --guidance-scale 2 --prompt "a red circle moving left" \
            --prompt "a blue square moving up"
    """
    from rich.console import Console

    from train.evaluation.evaluate import evaluate_clips

    evaluate_clips(config, Console(stderr=True))
