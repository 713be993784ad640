"""`wantrain merge` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.support import Command
from shared.models.spec import DEFAULT_MODEL
from train.options import OUTPUT

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

INPUT = "Input"


# fmt: off
def merge(
    lora: Annotated[list[Path], typer.Option(metavar="FILE", help="LoRA in any form, ours or another trainer's; several times for both experts, or to add several to one.", rich_help_panel=INPUT)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder that is made for the merged model.", rich_help_panel=OUTPUT)],
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the LoRAs are of: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL,
    boundary_type: Annotated[Literal["low", "high", "full"] | None, typer.Option(help="Expert of LoRAs that don't say which they are for; full works alone at all steps.", show_default="what the LoRA says", rich_help_panel=INPUT)] = None,
    lora_scale: Annotated[float, typer.Option(metavar="X", help="Strength with which the LoRAs are added; 1 is what they were trained with.", rich_help_panel=INPUT)] = 1.0,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Size at which a file of weights is closed and the next begun, such as 500MB or 80GB.", rich_help_panel=OUTPUT)] = "5GB",
) -> None:
    """Add LoRAs to a model's weights and write the whole model.

    The folder has the layout and the number formats of the model, in safetensors; sums are computed in fp32. Weights that no LoRA changes, such as the text encoder's, are hard links: they take no room, as long as both folders are on one disk. In diffusers: WanPipeline.from_pretrained(DIR)

    Next: docs/use-your-lora.md
    """
    from rich.console import Console

    from train.saving.merge import MergeConfig
    from train.saving.merge import merge as merge_model

    config = MergeConfig(
        model=model,
        loras=tuple(lora),
        boundary_type=boundary_type,
        lora_scale=lora_scale,
        output=output,
        max_shard_size=max_shard_size,
    )
    merge_model(config, Console(stderr=True))


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=Command, epilog=MERGE_EXAMPLES)(merge)
