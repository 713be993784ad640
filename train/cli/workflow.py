"""`wantrain workflow` on the command line."""

import typer

from shared.cli.checks import check_writable
from shared.cli.support import echo
from train.sampling.config import WorkflowConfig


def workflow(config: WorkflowConfig, _: typer.Context) -> None:
    r"""Write the workflow.

    Examples:
        # both experts of Wan2.2-I2V-A14B, in files that were renamed
        wantrain workflow --lora cats-high.safetensors --lora cats-low.safetensors

        # the LoRA of the bundled toy model
        wantrain workflow --lora toy-lora/lora-full-comfyui.safetensors \
            --output toy-workflow
    """
    from train.sampling.comfyui import read_for_comfyui, write_workflow

    loras, provenance, width = read_for_comfyui(config.lora)
    check_writable("--output", config.output)
    for path in write_workflow(config.output, loras, provenance, width):
        echo(f"ComfyUI  {path}")
    if base := provenance.recipe.get("base"):
        echo(f"warning  trained on {base}: load these weights in ComfyUI, too")
