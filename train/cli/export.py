"""`wantrain export` on the command line."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.checks import check_option
from shared.cli.support import echo
from shared.errors import UserError
from train.options import OUTPUT

INPUT = "LoRA"


# fmt: off
def export(
    to: Annotated[Literal["diffusers", "comfyui", "kohya"], typer.Option(help="Format of the output: diffusers' names, Wan's own names for ComfyUI, or kohya's for musubi-tuner (and ComfyUI).", rich_help_panel=OUTPUT)],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Output file, a .safetensors.", rich_help_panel=OUTPUT)],
    lora: Annotated[Path | None, typer.Option(metavar="FILE|DIR", help="LoRA of a Wan model: a .safetensors file with the names of diffusers, peft, ComfyUI, kohya or VideoX-Fun, with whole weights beside its pairs (.diff, .diff_b, .diff_m) or without; a folder of peft (adapter_config.json) or diffusers; an index of several files.", show_default="none: give --checkpoint", rich_help_panel=INPUT)] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint of a run, in place of a LoRA file.", show_default="none: give --lora", rich_help_panel=INPUT)] = None,
    alpha: Annotated[float | None, typer.Option(metavar="X", help="Alpha of every layer, in place of the LoRA's own. The matrices stay, so the strength becomes X / rank: for files that don't say the alpha that they were trained with, or to change the strength for good.", show_default="the LoRA's; its rank if it has none", rich_help_panel=INPUT)] = None,
    drop_extras: Annotated[bool, typer.Option("--drop-extras", help="Leave out all but the pairs on the blocks' linear layers: whole weights (.diff, .diff_b, .diff_m), which only comfyui can hold, and pairs on embeddings and head.", show_default="off", rich_help_panel=OUTPUT)] = False,
    save_precision: Annotated[Literal["bf16", "fp32"] | None, typer.Option(help="Number format of the file.", show_default="as in --lora; bf16 of a --checkpoint", rich_help_panel=OUTPUT)] = None,
) -> None:
    r"""Convert a LoRA to the format that another program loads.

    Strength (alpha and rank), unless --alpha changes it, and training metadata are kept. The export of a checkpoint equals, to the byte, the file that the run itself would have written there.

    Next: docs/use-your-lora.md

    Examples:
        # a LoRA from anywhere, for musubi-tuner or ComfyUI
        wantrain export --lora downloaded.safetensors --to kohya \
            --output lora-kohya.safetensors

        # VideoX-Fun's LoRA of --network_alpha 32 --use_peft_lora, which holds none
        wantrain export --lora checkpoint-500.safetensors --alpha 32 --to comfyui \
            --output lora-comfyui.safetensors

        # the LoRA as it was after 50 generator updates, for diffusers
        wantrain export --checkpoint output_dir_distill/low/checkpoint-50 \
            --to diffusers --output lora-low-50.safetensors

        # the LoRA of the bundled toy model
        wantrain export --lora toy-lora/lora-full-diffusers.safetensors --to comfyui \
            --output toy-lora/other.safetensors
    """
    from shared.format.schema import DTYPES
    from train.saving import export as exported

    if (lora is None) == (checkpoint is None):
        raise UserError(
            f"--lora: found {'neither --lora nor' if lora is None else 'both --lora and'} "
            "--checkpoint, expected one of the two."
        )
    if alpha is not None:
        check_option("alpha", alpha, math.isfinite(alpha) and alpha != 0, "a number other than 0")
    if lora is not None:
        source = exported.from_file(lora, alpha)
        dtype = None if save_precision is None else DTYPES[save_precision]
    else:
        assert checkpoint is not None
        source = exported.from_checkpoint(checkpoint, alpha)
        dtype = DTYPES[save_precision or "bf16"]
    exported.export(source, to, output, dtype, drop_extras=drop_extras)
    if source.note:
        echo(f"note     {source.note}")
    if alpha is not None:
        scales = sorted({source.lora.scale(module) for module in source.lora.modules})
        echo(f"strength {', '.join(f'{scale:g}' for scale in scales)} (alpha {alpha:g} / rank)")
    if extras := source.lora.extras:
        did = "left out" if drop_extras else "kept"
        echo(f"extras   {did} {len(extras)}: {', '.join(extras[:3])}{', …' * (len(extras) > 3)}")
    echo(f"LoRA     {output}")
# fmt: on
