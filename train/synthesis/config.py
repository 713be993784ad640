"""The options of `wantrain synthesize`: type, default, unit, help, group and check of each, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from shared.cli.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check_options
from shared.cluster.options import CLUSTER, WithRay
from shared.errors import UserError
from shared.io.shard_cache import DEFAULT_SHARD_CACHE_GB
from shared.models.family import TrainMode
from shared.models.spec import DEFAULT_MODEL
from train.data.weighted_folder import DEFAULT_SHARDS, WeightedFolder, shards_option
from train.memory.options import ForwardOnly
from train.options import (
    DEVICE,
    INPUT,
    OUTPUT,
    PROCESSES,
    Pairing,
    Precision,
    QuantisedPrecision,
)

SAMPLER = "Sampler"
STEPS, GUIDANCE = 40, 5.0


# fmt: off
@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig(WithRay, ForwardOnly):
    """Make shards of the base model's own clips.

    For captions and conditions in shards a clip is sampled from noise, with many steps and CFG, and stored as latents in the same format; no VAE or text encoder runs. With --states also the sampler's states at a student's timesteps. Interrupted and run again, it continues. Two experts are loaded one after the other.

    Next: wantrain distill --shards DIR
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, SAMPLER, OUTPUT, DEVICE, PROCESSES, CLUSTER)

    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the clips are of: a diffusers or Wan folder, a hub id, or a bundled toy (toy or toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL
    transformer_path: Annotated[Path | None, typer.Option(metavar="PATH", help="Custom weights for the low-noise expert, or for MODEL's only transformer, as in `wantrain distill`.", show_default="MODEL's", rich_help_panel=INPUT)] = None
    transformer_high_path: Annotated[Path | None, typer.Option(metavar="PATH", help="The same for the high-noise expert.", show_default="MODEL's", rich_help_panel=INPUT)] = None
    low_lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="LoRA to merge into the low-noise expert, or the only transformer, at strength X (1 if omitted). Can be given several times.", show_default="none", rich_help_panel=INPUT)] = None
    high_lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="The same for the high-noise expert.", show_default="none", rich_help_panel=INPUT)] = None
    shards: Annotated[list[WeightedFolder], typer.Option(parser=shards_option, metavar="DIR|URL", help="Folder of shards that `wanprep encode` made; media, or only captions for t2v.", rich_help_panel=INPUT)] = DEFAULT_SHARDS
    where: Annotated[list[str] | None, typer.Option(metavar="COND", help="Only samples that match, as in `wantrain distill`, e.g. 'frames>=17'; if given several times, all must match.", show_default="all samples", rich_help_panel=INPUT)] = None
    captions: Annotated[str | None, typer.Option(metavar="NAME", help="Captions from `wanprep recaption --name NAME` in place of the shards' own.", show_default="the shards' own", rich_help_panel=INPUT)] = None
    count: Annotated[int | None, typer.Option(metavar="N", help="Take only the first N of the samples, in the order of their keys, which is as good as random; a larger N later adds to them.", show_default="all samples", rich_help_panel=INPUT), AT_LEAST_1] = None
    clips_per_caption: Annotated[int, typer.Option(metavar="N", help="Clips of each sample, each from other noise.", rich_help_panel=INPUT), AT_LEAST_1] = 1
    train_mode: Annotated[TrainMode | None, typer.Option("--train-mode", help="normal: a ti2v model makes all clips as text to video, not from the first frame.", show_default="the model's", rich_help_panel=INPUT)] = None
    shard_cache_gb: Annotated[float, typer.Option(metavar="GB", help="Disk space for whole shards of an object store; shards beyond this limit are read sample by sample.", rich_help_panel=INPUT)] = DEFAULT_SHARD_CACHE_GB
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of all noise.", rich_help_panel=INPUT)] = 42

    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the sampler (Euler).", show_default="40", rich_help_panel=SAMPLER), AT_LEAST_1] = None
    guidance: Annotated[float, typer.Option("--guidance", "--guidance-scale", metavar="X", help="CFG scale, with the cached negative prompt; 0 or 1 is no guidance.", rich_help_panel=SAMPLER), NOT_NEGATIVE] = GUIDANCE
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: a level u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, else 5", rich_help_panel=SAMPLER), POSITIVE] = None
    states: Annotated[str | None, typer.Option(metavar="LIST", help="A student's steps, as timesteps before the shift, e.g. \"1000 750 500 250\": they join the sampler's steps, and its states there are stored, too.", show_default="none", rich_help_panel=SAMPLER)] = None
    student_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift of --states.", show_default="the sampler's", rich_help_panel=SAMPLER), POSITIVE] = None
    step_list: Annotated[str | None, typer.Option(metavar="LIST", help="Sample as a student with these steps in place of --steps, and store its states there; for --high-lora and --low-lora of students, with --guidance 1.", show_default="none", rich_help_panel=SAMPLER)] = None
    pairing: Annotated[Pairing | None, typer.Option(help="How --step-list goes from one step to the next: with fresh noise, or along the velocity.", show_default="renoise", rich_help_panel=SAMPLER)] = None

    output: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the new shards; clips that are in it already are not made again.", rich_help_panel=OUTPUT)] = "synthesized"
    shard_size_mb: Annotated[int, typer.Option(metavar="MB", help="Size, in megabytes, at which a shard is closed and the next one started.", rich_help_panel=OUTPUT), AT_LEAST_1] = 256
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be made, its cost in transformer passes, memory and disk space, then stop.", show_default="off", rich_help_panel=OUTPUT)] = False

    train_batch_size: Annotated[int, typer.Option("--batch-size", "--train-batch-size", metavar="N", help="Clips of one size that are sampled together.", rich_help_panel=DEVICE), AT_LEAST_1] = 1
    batched_guidance: Annotated[bool, typer.Option("--batched-guidance", help="Compute with and without caption in one batched pass, for twice the memory of its work.", show_default="off", rich_help_panel=DEVICE)] = False
    mixed_precision: Annotated[Precision, typer.Option(help="Model and compute in bf16, or all in fp32.", rich_help_panel=DEVICE)] = "bf16"
    base_precision: Annotated[QuantisedPrecision | None, typer.Option(help="Store the linear layers of the transformers' blocks in 8 or 4 bits, as in `wantrain distill`.", show_default="not quantised", rich_help_panel=DEVICE)] = None
    low_vram: Annotated[bool, typer.Option("--low-vram", help="Keep the transformer's blocks in CPU memory and copy each to the GPU while the one before it computes.", show_default="off", rich_help_panel=DEVICE)] = False
    blocks_to_swap: Annotated[int | None, typer.Option(metavar="N", help="Like --low-vram for N of the blocks, spread evenly; the others stay on the GPU.", show_default="none; with --low-vram all", rich_help_panel=DEVICE)] = None
    attention_backend: Annotated[str, typer.Option(metavar="NAME", envvar="DIFFUSERS_ATTN_BACKEND", help="Attention backend, by diffusers' names, as in `wantrain distill`.", rich_help_panel=DEVICE)] = "native"
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=DEVICE)] = "auto"
    num_processes: Annotated[int, typer.Option(metavar="N", help="Processes on this machine, one per GPU, each with its share of the clips; or start it by torchrun, accelerate or srun.", rich_help_panel=PROCESSES), AT_LEAST_1] = 1
    # fmt: on

    def __post_init__(self) -> None:
        check_options(self)
        self.check_engine(self.output, waiting="clips between the experts")
        if self.engine == "ray" and self.num_processes > 1:
            raise UserError(
                f"--num-processes: found {self.num_processes} with --engine ray, which starts its "
                "actors by itself. Use --ray-actors for their number."
            )
        if len(self.shards) > 1 or self.shards[0].weight != 1:
            given = " ".join(map(str, self.shards))
            raise UserError(
                f"--shards: found {given}, expected one folder without a weight: its fingerprint "
                "becomes that of the new shards. Run the command for each folder."
            )
        if self.step_list is not None:
            for name in ("steps", "states", "student_shift"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"--{name.replace('_', '-')}: found with --step-list, whose steps are all "
                        "that there are, and all stored. Leave out one of the two."
                    )
        for name, needed in (("pairing", "step_list"), ("student_shift", "states")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                option = needed.replace("_", "-")
                raise UserError(
                    f"--{name.replace('_', '-')}: found without --{option}, which it is about. "
                    f"Leave it out, or add --{option} LIST."
                )
        _ = self.memory  # refuses what excludes one another
