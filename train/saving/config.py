"""The options of `wantrain merge`: type, default, help, group and check of each, once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from shared.cli.checks import check_option
from shared.errors import UserError
from shared.models.spec import DEFAULT_MODEL
from train.options import INPUT, OUTPUT, Expert


# fmt: off
@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Add LoRAs to a model's weights and write the whole model.

    The folder has the layout and the number formats of the model, in safetensors; sums are computed in fp32. Weights that no LoRA changes, such as the text encoder's, are hard links, which take no space if both folders are on one disk. In diffusers: WanPipeline.from_pretrained(DIR)

    Next: docs/use-your-lora.md
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, OUTPUT)

    lora: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="LoRA in any format, ours or another trainer's: a file, or a folder of peft or diffusers; weights beside its pairs (.diff, .diff_b, .diff_m) are added, too. Give several for both experts, or to add several to one.", rich_help_panel=INPUT)]
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the merged model.", rich_help_panel=OUTPUT)]
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the LoRAs are for: a diffusers or Wan folder, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL
    boundary_type: Annotated[Expert | None, typer.Option(help="Expert of LoRAs whose metadata doesn't name one; full: one LoRA for all steps.", show_default="the LoRA's", rich_help_panel=INPUT)] = None
    lora_scale: Annotated[float, typer.Option(metavar="X", help="Strength with which the LoRAs are added; 1 is what they were trained with.", rich_help_panel=INPUT)] = 1.0
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Maximum size of a weight file, such as 500MB or 80GB.", rich_help_panel=OUTPUT)] = "5GB"
    # fmt: on

    def __post_init__(self) -> None:
        scale = self.lora_scale
        fine = math.isfinite(scale) and scale != 0
        check_option("lora_scale", scale, fine, "a number other than 0, such as 1")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UserError(
                f"--output: {self.output} is there already. Name a folder that is not, or delete "
                "this one."
            )
