"""`wantrain export` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.support import Command, echo
from shared.errors import UserError
from train.options import OUTPUT

EXPORT_EXAMPLES = """
# a LoRA from anywhere, for musubi-tuner or ComfyUI
wantrain export --lora downloaded.safetensors --to kohya \\
    --output lora-kohya.safetensors

# the LoRA as it was after 50 generator updates, for diffusers
wantrain export --checkpoint output_dir_distill/checkpoint-50 --to diffusers \\
    --output lora-low-50.safetensors

# the LoRA of the bundled toy model
wantrain export --lora toy-lora/lora-full-diffusers.safetensors --to comfyui \\
    --output toy-lora/other.safetensors
"""

INPUT = "LoRA"


# fmt: off
def export(
    to: Annotated[Literal["diffusers", "comfyui", "kohya"], typer.Option(help="Format of the output: diffusers' names, Wan's own names for ComfyUI, or kohya's for musubi-tuner (and ComfyUI).", rich_help_panel=OUTPUT)],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Output file, a .safetensors.", rich_help_panel=OUTPUT)],
    lora: Annotated[Path | None, typer.Option(metavar="FILE", help="LoRA of a Wan model in any format, ours or another trainer's.", show_default="none: give --checkpoint", rich_help_panel=INPUT)] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint of a run, in place of a LoRA file.", show_default="none: give --lora", rich_help_panel=INPUT)] = None,
    save_precision: Annotated[Literal["bf16", "fp32"] | None, typer.Option(help="Number format of the file.", show_default="as in --lora; bf16 of a --checkpoint", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Convert a LoRA to the format that another program loads.

    Strength (alpha and rank) and training metadata are kept. The export of a checkpoint equals, to the byte, the file that the run itself would have written there.

    Next: docs/use-your-lora.md
    """
    from shared.format.schema import DTYPES
    from train.saving import export as exported

    if (lora is None) == (checkpoint is None):
        raise UserError(
            f"--lora: found {'neither --lora nor' if lora is None else 'both --lora and'} "
            "--checkpoint, expected one of the two."
        )
    if lora is not None:
        source = exported.from_file(lora)
        dtype = None if save_precision is None else DTYPES[save_precision]
    else:
        assert checkpoint is not None
        source = exported.from_checkpoint(checkpoint)
        dtype = DTYPES[save_precision or "bf16"]
    exported.export(source, to, output, dtype)
    if source.note:
        echo(f"note     {source.note}")
    echo(f"LoRA     {output}")


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=Command, epilog=EXPORT_EXAMPLES)(export)
