"""The options of `wantrain calibrate`: type, default, help, group and check of each, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from shared.cli.checks import AT_LEAST_1, POSITIVE, Check
from train.config import InputOptions
from train.data.weighted_folder import DEFAULT_SHARDS, WeightedFolder, shards_option
from train.memory.options import (
    BlocksToSwap,
    ForwardOnly,
    LowVram,
    MixedPrecision,
    StoredPrecision,
)
from train.options import DEVICE, INPUT, OUTPUT, Expert

MEASURE = "What to measure"
AT_LEAST_2 = Check(lambda n: n >= 2, "a whole number from 2")


# fmt: off
@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(InputOptions, ForwardOnly):
    """Measure the teacher's guidance by noise level.

    One CFG scale for all noise levels overshoots at high noise. On clips that the teacher itself made with CFG (`wantrain synthesize`), this finds for each level the scale with which the teacher denoises them best. Measures one expert; its entry is added to the file. Takes --levels x 2 transformer passes a clip.

    Next: wantrain distill --guidance FILE
    """

    PANELS: ClassVar[Sequence[str]] = (MEASURE, INPUT, OUTPUT, DEVICE)

    shards: Annotated[list[WeightedFolder], typer.Option(parser=shards_option, metavar="DIR|URL", help="Folder of the teacher's own clips, made by `wantrain synthesize`; several, if given several times.", rich_help_panel=INPUT)] = DEFAULT_SHARDS
    boundary_type: Annotated[Expert | None, typer.Option(help="Expert to measure: low or high noise, or full for a model with one transformer (or one LoRA for all steps).", show_default="low if the model has two experts, else full", rich_help_panel=INPUT)] = None
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write; entries of other experts in it stay. A plot goes beside it, as .svg.", rich_help_panel=OUTPUT)] = Path("guidance.json")
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be measured and its cost, then stop.", show_default="off", rich_help_panel=OUTPUT)] = False
    clips: Annotated[int, typer.Option(metavar="N", help="Clips to measure on, drawn from the shards.", rich_help_panel=MEASURE), AT_LEAST_2] = 24
    levels: Annotated[int, typer.Option(metavar="N", help="Noise levels over the expert's interval, as evenly before as after the shift.", rich_help_panel=MEASURE), AT_LEAST_2] = 15
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: timestep 1000*u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=MEASURE), POSITIVE] = None
    batch_size: Annotated[int, typer.Option(metavar="N", help="Noise levels of a clip in one transformer pass.", rich_help_panel=DEVICE), AT_LEAST_1] = 1
    mixed_precision: MixedPrecision = "bf16"
    base_precision: StoredPrecision = None
    low_vram: LowVram = False
    blocks_to_swap: BlocksToSwap = None
    attention_backend: Annotated[str, typer.Option(metavar="NAME", envvar="DIFFUSERS_ATTN_BACKEND", help="Attention backend, by diffusers' names, as in `wantrain distill`.", rich_help_panel=DEVICE)] = "native"
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=DEVICE)] = "auto"
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.memory  # refuses what does not go together
