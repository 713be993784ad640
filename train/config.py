"""The options of runs: type, default, unit, help, group and check of each, once.

From these fields follow the command's options and help page, the table of VideoX-Fun's flags, the
--dry-run and what a checkpoint remembers. Torch stays out: a help page needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from shared.cli.checks import (
    ABOVE_0,
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    REMEMBERED,
    SHARE,
    Check,
    check_option,
    check_options,
)
from shared.errors import UserError
from shared.io.shard_cache import DEFAULT_SHARD_CACHE_GB
from shared.models.family import TrainMode
from shared.models.spec import DEFAULT_MODEL
from train.data.weighted_folder import DEFAULT_SHARDS, WeightedFolder, shards_option
from train.distributed.options import ProcessOptions
from train.memory.options import MemoryOptions
from train.options import (
    DATA,
    DEVICE,
    INPUT,
    LEAST_POLYNOMIAL_RATE,
    LENGTH,
    LORA,
    OPTIMIZER,
    OUTPUT,
    PROCESSES,
    WATCH,
    DistillMethod,
    Exits,
    Experts,
    Gauge,
    LevelRange,
    LrScheduler,
    Match,
    Maths,
    OptimizerName,
    Pairing,
    ScoreFloor,
    Start,
    StrategyName,
    Tail,
    TimestepSampling,
    is_number,
    names,
)

LEVELS = "Noise levels"
DMD = "Distillation"
BENCH = "Bench"
NUMBER_OR_FILE = Check(
    lambda text: not is_number(text) or 0 <= float(text) < inf,
    "0 or more, or the file of `wantrain calibrate`",
)
OF_REGRESSION = ("method", "denoising_step_indices_list", "flow_shift", "uniform_sampling")
"""What `--method regression` takes of distillation's own options."""
# So that the passes for the reference are a few in a hundred of a run's.
STEPS_PER_GAUGE_BATCH, MOST_GAUGE_BATCHES = 16, 32

UNSEEN: dict[OptimizerName, tuple[str, ...]] = {
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "muon": ("adam_beta1", "adam_beta2"),
}
"""Options that an optimizer has nothing for."""
LEAST_PRODIGY_RATE = 0.01

# fmt: off
Model = Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model to train a LoRA for: a diffusers or Wan folder, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)]
BOUNDARY_TYPE = partial(typer.Option, help="Expert to train: low or high noise; both, one after the other, into DIR/high and DIR/low of --output-dir; or full for a model with one transformer (or one LoRA for all steps).", rich_help_panel=INPUT)
BoundaryType = Annotated[Experts | None, BOUNDARY_TYPE(show_default="both if the model has two experts (low with --recipe seed), else full")]
BoundaryTypeOfOne = Annotated[Experts | None, BOUNDARY_TYPE(show_default="low if the model has two experts, else full")]
Rank = Annotated[int, typer.Option(metavar="N", help="LoRA rank.", rich_help_panel=LORA)]
TargetName = Annotated[str, typer.Option(metavar="LIST", help="Layers of each block that get a LoRA, in Wan's or diffusers' names.", rich_help_panel=LORA)]
LoraSkipName = Annotated[str, typer.Option(metavar="LIST", help="Skip layers whose name contains one of these, e.g. cross_attn.", show_default="none", rich_help_panel=LORA)]
EmaDecay = Annotated[float, typer.Option(metavar="X", help="EMA decay of the LoRA's weights, e.g. 0.99: the saved LoRA is their moving average; 0: the last weights.", rich_help_panel=LORA), BELOW_1]
LearningRate = Annotated[float, typer.Option(metavar="X", help="Learning rate of the LoRA (distill: of the generator); adafactor wants 0.01, prodigy 1.", rich_help_panel=OPTIMIZER), POSITIVE]
OutputDir = Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints, logs and the final LoRA.", rich_help_panel=OUTPUT)]
TrainBatchSize = Annotated[int, typer.Option(metavar="N", help="Samples per process in one forward and backward pass.", rich_help_panel=DATA), AT_LEAST_1, REMEMBERED]


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """What a command reads that works on shards with a transformer of a model."""

    model: Model = DEFAULT_MODEL
    transformer_path: Annotated[Path | None, typer.Option(metavar="PATH", help="Custom weights in place of the expert's in MODEL: a .safetensors file (Wan's, ComfyUI's or diffusers' names; fp32, bf16, fp16 or fp8), or a folder. Config, VAE and text encoder stay MODEL's.", show_default="the expert in MODEL", rich_help_panel=INPUT)] = None
    base_lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="LoRA to merge into the base first, at strength X (1 if omitted); diffusers', ComfyUI's or kohya's format. Can be given several times.", show_default="none", rich_help_panel=INPUT)] = None
    shards: Annotated[list[WeightedFolder], typer.Option(parser=shards_option, metavar="DIR|URL", help="Folder of shards that `wanprep encode` made; several, if given several times. DIR@W has a weight: an epoch shows its samples W times, e.g. DIR@3 or DIR@0.5.", rich_help_panel=INPUT)] = DEFAULT_SHARDS
    where: Annotated[list[str] | None, typer.Option(metavar="COND", help="Take only samples that match, e.g. 'frames>=17', 'tag=good', 'caption~=cat' or 'source=clips/*'; if given several times, all must match. Fields: caption, source, tag, type, bucket, height, width, frames, tokens.", show_default="all samples", rich_help_panel=INPUT)] = None
    shard_cache_gb: Annotated[float, typer.Option(metavar="GB", help="Disk space for whole shards of an object store (s3://bucket/shards); shards beyond this limit are read sample by sample.", rich_help_panel=INPUT)] = DEFAULT_SHARD_CACHE_GB
    captions: Annotated[str | None, typer.Option(metavar="NAME", help="Captions from `wanprep recaption --name NAME` in place of the shards' own.", show_default="the shards' own", rich_help_panel=INPUT)] = None
    boundary_type: BoundaryType = None
    train_mode: Annotated[TrainMode | None, typer.Option("--train-mode", help="Type of the model; one that it does not have is an error. flf2v, first and last frame, also with Wan 2.2 I2V-A14B; normal is t2v; with a ti2v model it trains on all clips as text to video.", show_default="the model's", rich_help_panel=INPUT), REMEMBERED] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the whole run.", rich_help_panel=INPUT), REMEMBERED] = 42
    # fmt: on

    def __post_init__(self) -> None:
        check_options(self)
        places = [folder.place for folder in self.shards]
        for folder, place in zip(self.shards, places, strict=True):
            if (times := places.count(place)) > 1:
                raise UserError(
                    f"--shards: {folder.path} is given {times} times. Give it once, "
                    f"with a weight if it should count more: {folder.path}@{times}"
                )


# fmt: off
@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputOptions, ProcessOptions, MemoryOptions):
    """What every run has, whatever it learns. Names and defaults are the seed document's.

    None means: decided by the model, or as `show_default` says. A *step* is an optimizer step of
    the LoRA that the run is for.
    """

    output_dir: OutputDir
    save_precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of the final LoRA files (checkpoints are fp32).", rich_help_panel=OUTPUT)] = "bf16"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration, the plan and a memory estimate, then stop.", show_default="off", rich_help_panel=OUTPUT)] = False

    max_train_steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps of the LoRA (distill: of the generator), in place of epochs.", show_default="as many as the epochs have", rich_help_panel=LENGTH), AT_LEAST_1] = None
    num_train_epochs: Annotated[int, typer.Option(metavar="N", help="Epochs, passes over the shards, in place of --max-train-steps (distill: counting steps of both roles).", rich_help_panel=LENGTH), AT_LEAST_1] = 100
    checkpointing_steps: Annotated[int, typer.Option(metavar="N", help="Save a checkpoint every N optimizer steps of the LoRA (distill: of the generator).", rich_help_panel=LENGTH), AT_LEAST_1] = 50
    checkpoints_total_limit: Annotated[int | None, typer.Option(metavar="N", help="Keep at most N checkpoints; the oldest are deleted.", show_default="all", rich_help_panel=LENGTH), AT_LEAST_1] = None
    resume_from_checkpoint: Annotated[str | None, typer.Option(metavar="DIR|latest", help="Checkpoint to resume from: its folder, or latest (a new run if there is none yet).", show_default="a new run", rich_help_panel=LENGTH)] = None

    validation_steps: Annotated[int | None, typer.Option(metavar="N", help="Sample the shards' validation prompts (see `wanprep encode`) every N optimizer steps of the LoRA, and once before the first; previews show the latents' colours, without a VAE.", show_default="never", rich_help_panel=WATCH), NOT_NEGATIVE] = None
    validation_seeds: Annotated[int, typer.Option(metavar="N", help="Clips of each validation prompt, each from its own noise; from 2 on their variety is measured.", rich_help_panel=WATCH), AT_LEAST_1] = 1
    report_to: Annotated[str, typer.Option(metavar="LIST", help="Where numbers and validation clips go: tensorboard, csv, wandb, comet_ml, aim, mlflow, clearml, dvclive, swanlab, trackio; several with commas, all that are installed, or none.", rich_help_panel=WATCH)] = "tensorboard"
    logging_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the trackers' files.", show_default="logs in the output folder", rich_help_panel=WATCH)] = None
    tracker_project_name: Annotated[str, typer.Option(metavar="NAME", help="Project name in wandb and similar trackers.", rich_help_panel=WATCH)] = "wandistill"

    init_lora: Annotated[str | None, typer.Option(metavar="FILE[:X]", help="Start from this LoRA, at strength X (1 if omitted), instead of a new one (distill: the generator only); diffusers', ComfyUI's or kohya's format, any alpha, rank up to --rank.", show_default="none", rich_help_panel=LORA)] = None
    rank: Annotated[Rank, AT_LEAST_1] = 64
    network_alpha: Annotated[float, typer.Option(metavar="X", help="LoRA alpha: the LoRA's output is scaled by alpha / rank.", rich_help_panel=LORA), POSITIVE] = 32
    target_name: TargetName = "q,k,v,ffn.0,ffn.2"
    lora_skip_name: LoraSkipName = ""
    ema_decay: EmaDecay = 0.0
    ema_start: Annotated[int, typer.Option(metavar="N", help="Optimizer steps of the LoRA before the EMA begins.", rich_help_panel=LORA), NOT_NEGATIVE] = 100

    learning_rate: LearningRate
    lr_scheduler: Annotated[LrScheduler, typer.Option(metavar="NAME", help="Learning-rate schedule after the warm-up: constant, linear, cosine, cosine_with_restarts or polynomial (diffusers'), or warmup_stable_decay: constant, then falling to 0 over the second half.", rich_help_panel=OPTIMIZER), REMEMBERED] = "constant"
    lr_warmup_steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps over which the learning rate rises from 0 (distill: of each role).", rich_help_panel=OPTIMIZER), NOT_NEGATIVE, REMEMBERED] = 0
    adam_beta1: Annotated[float, typer.Option(metavar="X", help="AdamW's and prodigy's beta1: decay rate of the first moment.", rich_help_panel=OPTIMIZER), BELOW_1, REMEMBERED] = 0.9
    adam_beta2: Annotated[float, typer.Option(metavar="X", help="AdamW's and prodigy's beta2: decay rate of the second moment.", rich_help_panel=OPTIMIZER), BELOW_1, REMEMBERED] = 0.999
    adam_weight_decay: Annotated[float, typer.Option(metavar="X", help="Weight decay, decoupled as AdamW's.", rich_help_panel=OPTIMIZER), NOT_NEGATIVE, REMEMBERED] = 3e-2
    adam_epsilon: Annotated[float, typer.Option(metavar="X", help="Epsilon of the optimizer; adafactor has its own.", rich_help_panel=OPTIMIZER), NOT_NEGATIVE, REMEMBERED] = 1e-10
    max_grad_norm: Annotated[float, typer.Option(metavar="X", help="Clip the gradient norm of each optimizer step to this.", rich_help_panel=OPTIMIZER), POSITIVE, REMEMBERED] = 0.05

    train_batch_size: TrainBatchSize = 1
    gradient_accumulation_steps: Annotated[int, typer.Option(metavar="N", help="Forward and backward passes per optimizer step.", rich_help_panel=DATA), AT_LEAST_1, REMEMBERED] = 1
    video_repeat: Annotated[int | None, typer.Option(metavar="N", help="Times that a video occurs in an epoch; overrides the shards' value.", show_default="the shards' value", rich_help_panel=DATA), AT_LEAST_1, REMEMBERED] = None
    caption_dropout: Annotated[float, typer.Option(metavar="X", help="Share of captions, 0 to 1, that are replaced by the empty prompt.", rich_help_panel=DATA), SHARE, REMEMBERED] = 0.1
    random_frame_crop: Annotated[bool, typer.Option("--random-frame-crop", help="In one optimizer step of ten, truncate clips at a random length (4n+1, from 5), so that the LoRA also learns shorter clips.", show_default="off", rich_help_panel=DATA), REMEMBERED] = False
    tail: Annotated[Tail, typer.Option(help="A bucket's last, incomplete batch: pad it with samples of the bucket, or drop it.", rich_help_panel=DATA), REMEMBERED] = "pad"
    dataloader_num_workers: Annotated[int, typer.Option(metavar="N", help="Threads that read batches ahead; 0: read in the training loop.", rich_help_panel=DATA), NOT_NEGATIVE] = 8

    allow_tf32: Annotated[bool, typer.Option("--allow-tf32", help="Multiply fp32 matrices in TF32 on a GPU: faster, with mantissas rounded to 10 bits.", show_default="off", rich_help_panel=DEVICE), REMEMBERED] = False
    deterministic: Annotated[bool, typer.Option("--deterministic", help="On a GPU: only kernels that give the same bits every time, so that a resumed run equals an uninterrupted one to the byte. Slower; a CPU does so anyway.", show_default="off", rich_help_panel=DEVICE), REMEMBERED] = False
    compile: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks with torch.compile: minutes at the start, then faster steps; see docs/speed.md.", show_default="off", rich_help_panel=DEVICE), REMEMBERED] = False
    fused_lora: Annotated[bool, typer.Option("--fused-lora", help="Add the LoRA to a layer's output inside its last matmul: three passes over memory less for each layer, and other rounding; see docs/speed.md.", show_default="off", rich_help_panel=DEVICE), REMEMBERED] = False
    attention_backend: Annotated[str, typer.Option(metavar="NAME", envvar="DIFFUSERS_ATTN_BACKEND", help="Attention backend, by diffusers' names: native (torch SDPA), flash (flash-attn), _flash_3_hub, xformers, _native_cudnn, _native_flash and so on.", rich_help_panel=DEVICE), REMEMBERED] = "native"
    # fmt: on

    def __post_init__(self) -> None:
        MemoryOptions.__post_init__(self)
        super().__post_init__()
        self._check_learning_rate("learning_rate", self.learning_rate)
        self._check_adam_options()
        check_option("target_name", "''", bool(self.targets), "names of layers, e.g. q,k,v")
        if self.compile and self.keep_attention:
            raise UserError(
                "--keep-attention: found with --compile, whose blocks are one piece to torch. Leave "
                "out one of the two."
            )
        for option, given in (("--compile", self.compile), ("--fused-lora", self.fused_lora)):
            if given and self.strategy == "zero3":
                raise UserError(
                    f"{option}: found with --strategy zero3, where DeepSpeed gathers the weights "
                    f"of layers inside a block. Use --strategy fsdp, or leave {option} out."
                )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of layers that get a LoRA."""
        return names(self.target_name)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Parts of names of layers that get none, though `targets` has them."""
        return names(self.lora_skip_name)

    def _check_adam_options(self) -> None:
        """UserError for those that the optimizer would not see."""
        for name in UNSEEN.get(self.optimizer, ()):
            found, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if found != default:
                raise UserError(
                    f"--{name.replace('_', '-')}: found {found:g} with --optimizer "
                    f"{self.optimizer}, which has none. Leave it out."
                )
        if self.optimizer == "prodigy":
            check_option("adam_epsilon", self.adam_epsilon, self.adam_epsilon > 0, ABOVE_0)

    def _check_learning_rate(self, name: str, rate: float) -> None:
        option = name.replace("_", "-")
        if self.optimizer == "prodigy" and rate < LEAST_PRODIGY_RATE:
            raise UserError(
                f"--{option}: found {rate:g} with --optimizer prodigy, which finds the rate itself "
                f"and multiplies it by this. Expected about 1: --{option} 1"
            )
        if self.lr_scheduler == "polynomial":
            least = LEAST_POLYNOMIAL_RATE
            expected = f"more than {least:g}, where --lr-scheduler polynomial ends"
            check_option(name, rate, rate > least, expected)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Train a plain LoRA of one expert on clips in shards.

    What the base model does not know, such as a character, a style or a motion, is learned from the clips by flow matching; steps and CFG stay those of the base model. SIGTERM and Ctrl-C leave a checkpoint and a loadable LoRA.

    Next: wantrain sample --lora FILE --prompt TEXT
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, OUTPUT, LENGTH, WATCH, LEVELS, LORA, OPTIMIZER, DATA, DEVICE, PROCESSES)

    output_dir: OutputDir = Path("output_dir_lora")
    timestep_sampling: Annotated[TimestepSampling, typer.Option(help="Distribution of noise levels before the shift, inside the expert's range: uniform, or logit-normal (the sigmoid of a normal, mostly middle levels).", rich_help_panel=LEVELS)] = "uniform"
    logit_mean: Annotated[float | None, typer.Option(metavar="X", help="Mean of logit-normal; above 0 is noisier.", show_default="0", rich_help_panel=LEVELS)] = None
    logit_std: Annotated[float | None, typer.Option(metavar="X", help="Standard deviation of logit-normal.", show_default="1", rich_help_panel=LEVELS)] = None
    uniform_sampling: Annotated[bool, typer.Option(help="Spread the levels of a batch's samples evenly over that distribution instead of drawing each independently; no effect with one sample per optimizer step.", show_default="on", rich_help_panel=LEVELS)] = True
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: a level u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, 16 for Wan 2.1 FLF2V, else 5", rich_help_panel=LEVELS), POSITIVE] = None
    learning_rate: LearningRate = 1e-4
    holdout: Annotated[float, typer.Option(metavar="X", help="Share of the source files, e.g. 0.05, that is not trained on, with all captions, variants and clips of these files; the loss on it is logged.", show_default="0: none", rich_help_panel=WATCH), BELOW_1] = 0.0
    holdout_steps: Annotated[int | None, typer.Option(metavar="N", help="Measure that loss every N optimizer steps, and once before the first.", show_default="as --validation-steps, or else as --checkpointing-steps", rich_help_panel=WATCH), AT_LEAST_1] = None
    # fmt: on

    @property
    def held_out_every(self) -> int:
        """Steps between two measurements of the loss on what is held out."""
        return self.holdout_steps or self.validation_steps or self.checkpointing_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout_steps and not self.holdout:
            raise UserError(
                f"--holdout-steps: found {self.holdout_steps} without --holdout, so there is nothing "
                "to measure. Add --holdout 0.05, or leave it out."
            )
        for name in ("logit_mean", "logit_std"):
            if (value := getattr(self, name)) is None:
                continue
            if self.timestep_sampling != "logit-normal":
                raise UserError(
                    f"--{name.replace('_', '-')}: found {value:g} with --timestep-sampling "
                    f"{self.timestep_sampling}; it is only for logit-normal. Leave it out, or add "
                    "--timestep-sampling logit-normal."
                )
            fine = isfinite(value) and (name == "logit_mean" or value > 0)
            check_option(name, value, fine, ABOVE_0 if name == "logit_std" else "a number")


# fmt: off
@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Distil a few-step LoRA of one expert from shards (DMD).

    The student (generator) learns to do in a few steps what the base model (teacher) does in many with CFG; a critic, a second LoRA, follows the student. One update is one optimizer step of one of the two. SIGTERM and Ctrl-C leave a checkpoint and a loadable LoRA.

    Next: wantrain sample --lora FILE --prompt TEXT
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, OUTPUT, LENGTH, WATCH, DMD, LORA, OPTIMIZER, DATA, DEVICE, PROCESSES)

    output_dir: OutputDir = Path("output_dir_distill")
    method: Annotated[DistillMethod, typer.Option(help="dmd, or regression along the teacher's states, without a critic, on shards of `wantrain synthesize --states`.", rich_help_panel=DMD)] = "dmd"
    denoising_step_indices_list: Annotated[str, typer.Option(metavar="LIST", help="The student's steps, as timesteps before the shift: 1000 is pure noise, 0 the clip.", rich_help_panel=DMD)] = "1000,750,500,250"
    flow_shift: Annotated[float | None, typer.Option(metavar="X", help="Shift s of the noise schedule: timestep 1000*u becomes sigma = s*u / (1 + (s-1)*u).", show_default="12 for Wan 2.2 A14B t2v, 16 for Wan 2.1 FLF2V, else 5", rich_help_panel=DMD), POSITIVE] = None
    recipe: Annotated[Maths, typer.Option(help="seed: VideoX-Fun's maths, for comparison; each expert runs all steps, from noise, and score levels have no cap and no floor.", rich_help_panel=DMD)] = "corrected"
    start: Annotated[Start | None, typer.Option(help="Rollouts start from cached latents noised to the expert's first step, from cached states at that step (low expert; `wantrain synthesize --states`), or from pure noise at the first of all steps, as in VideoX-Fun.", show_default="latents for low, else noise", rich_help_panel=DMD)] = None
    pairing: Annotated[Pairing, typer.Option(help="How one step leads to the next: with fresh noise (sample with LCM) or along the velocity (sample with Euler).", rich_help_panel=DMD)] = "renoise"
    match: Annotated[Match, typer.Option(help="What of the student is matched with the teacher: its clips (x0), or the states where the high-noise expert hands over (phased DMD; best with --pairing euler).", rich_help_panel=DMD)] = "x0"
    score_floor: Annotated[ScoreFloor, typer.Option(help="Where the high-noise expert's score levels end: at the model's boundary or at the first step of the low-noise expert.", rich_help_panel=DMD)] = "boundary"
    score_levels: Annotated[LevelRange, typer.Option(help="Where scores are compared: over the expert's whole interval, or, for each exit (the step that an update trains), only above the next step's level.", rich_help_panel=DMD)] = "interval"
    uniform_sampling: Annotated[bool, typer.Option(help="Spread the score levels of a batch's samples evenly over the expert's interval instead of drawing each independently; no effect with one sample per optimizer step.", show_default="on", rich_help_panel=DMD)] = True
    real_guidance_scale: Annotated[str, typer.Option("--real-guidance-scale", "--guidance", metavar="X|FILE", help="CFG scale of the teacher, with the cached negative prompt; 0 or 1 is no guidance. Or a file of `wantrain calibrate`: the scale by noise level.", rich_help_panel=DMD), NUMBER_OR_FILE] = "6.0"
    fake_guidance_scale: Annotated[float, typer.Option(metavar="X", help="CFG scale of the critic; 0 is no guidance.", rich_help_panel=DMD), NOT_NEGATIVE] = 0.0
    gen_update_interval: Annotated[int, typer.Option(metavar="N", help="Critic updates before each generator update.", rich_help_panel=DMD), AT_LEAST_1] = 5
    critic_warmup: Annotated[int, typer.Option(metavar="N", help="Critic updates ahead of all others, before --gen-update-interval begins to count.", rich_help_panel=DMD), NOT_NEGATIVE] = 0
    exits: Annotated[Exits, typer.Option(help="Steps that are trained: in each update one of all that a rollout passes, or always the last.", rich_help_panel=DMD)] = "all"
    fm_loss_weight: Annotated[float, typer.Option(metavar="X", help="Add flow matching on the cached latents, times this, to the generator's loss; 0: only DMD.", rich_help_panel=DMD), NOT_NEGATIVE] = 0.0
    learning_rate: LearningRate = 1e-5
    learning_rate_critic: Annotated[float, typer.Option(metavar="X", help="Learning rate of the critic.", rich_help_panel=OPTIMIZER), POSITIVE] = 1e-6
    gauge_batches: Annotated[int | None, typer.Option(metavar="N", help="Batches per process (2 or more) on which the teacher's contrast and motion are measured once, before the first update; 0: no gauges.", show_default="1 for every 16 steps of the LoRA, at most 32; none in fewer than 32 steps", rich_help_panel=WATCH)] = None
    keep_best: Annotated[Gauge | None, typer.Option(help="Also keep the checkpoint whose contrast, motion or variety is nearest to the teacher's, with its LoRA files, in a folder of its own in the output folder.", show_default="only the last ones", rich_help_panel=WATCH)] = None
    batched_guidance: Annotated[bool, typer.Option(help="Compute the guided teacher (and critic) with and without caption in one batched pass: half the communication under fsdp and zero3, for twice the memory of a pass without gradients.", show_default="off", rich_help_panel=DEVICE)] = False
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_learning_rate("learning_rate_critic", self.learning_rate_critic)
        batches = self.gauge_batches
        check_option("gauge_batches", batches, batches in (None, 0) or batches >= 2, "0, or 2 or more")
        self._check_keep_best()
        for option, given in {
            f"--start {self.start}": self.start not in (None, "noise"),
            "--score-floor handover": self.score_floor != "boundary",
            "--score-levels exit": self.score_levels != "interval",
            "--exits last": self.exits != "all",
            "--match handover": self.match != "x0",
            f"--critic-warmup {self.critic_warmup}": self.critic_warmup > 0,
            f"--real-guidance-scale {self.real_guidance_scale}": not is_number(
                self.real_guidance_scale
            ),
        }.items():
            if given and self.recipe == "seed":
                raise UserError(
                    f"--recipe: found seed with {option}, but the seed's recipe starts from noise, "
                    "trains all steps, draws its score levels from the expert's whole interval, "
                    "matches clips and has one guidance scale. Leave out one of the two."
                )
        if self.method == "regression":
            self._refuse_options_of_dmd()

    def _refuse_options_of_dmd(self) -> None:
        """UserError where one is given that regression has no use for."""
        taken = {*TrainConfig.__dataclass_fields__, *OF_REGRESSION}
        for name, option in DistillConfig.__dataclass_fields__.items():
            value = getattr(self, name)
            unused = name not in taken and value != option.default
            if not unused or (name, value) == ("pairing", "euler"):
                continue
            raise UserError(
                f"--{name.replace('_', '-')}: found {value} with --method regression, which has no "
                "critic, no rollouts and no guidance, and goes by Euler's steps. Leave it out."
            )

    def _check_keep_best(self) -> None:
        if self.keep_best == "variety":
            every = self.validation_steps
            if not every or self.checkpointing_steps % every or self.validation_seeds < 2:
                raise UserError(
                    "--keep-best: found variety, which needs --validation-seeds 2 or more and a "
                    "validation at each checkpoint: --checkpointing-steps "
                    f"{self.checkpointing_steps} a multiple of --validation-steps (found {every})."
                )
        elif self.keep_best and self.gauge_batches == 0:
            raise UserError(
                f"--keep-best: found {self.keep_best} with --gauge-batches 0. Leave out one of the "
                "two."
            )

    def batches_of_gauges(self, steps: int) -> int:
        """Those on which the teacher is measured in a run of so many steps of the LoRA."""
        if self.gauge_batches is not None:
            return self.gauge_batches
        wanted = min(MOST_GAUGE_BATCHES, steps // STEPS_PER_GAUGE_BATCH)
        needed = 2 if self.keep_best in ("contrast", "motion") else 0
        return max(needed, wanted if wanted >= 2 else 0)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class BenchConfig(DistillConfig):
    """Measure the overhead of a run on this machine.

    Reports the time that the loop adds to the transformer's passes, FLOPs per update and per second, and the peak of memory beside what --dry-run plans. Takes every option of `wantrain distill`; runs its loop for a few updates in a temporary folder, which is deleted. With several processes (--strategy), it reports the first one.

    Next: wantrain distill, with the same options
    """

    PANELS: ClassVar[Sequence[str]] = (BENCH, *DistillConfig.PANELS)

    boundary_type: BoundaryTypeOfOne = None
    cycles: Annotated[int, typer.Option(metavar="N", min=1, help="Generator updates that are measured, each with its critic updates; one more warms up.", rich_help_panel=BENCH)] = 1
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers to this file.", show_default="nowhere", rich_help_panel=BENCH)] = None
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary_type == "both":
            raise UserError(
                "--boundary-type: found both, but bench measures a run of one expert; the experts "
                "of a model are alike. Use --boundary-type high or low."
            )


# fmt: off
@dataclass(frozen=True, kw_only=True)
class PlanConfig(MemoryOptions):
    """Estimate the GPU memory that a run needs.

    Also lists options that need less. Reads only configs: those of the published Wan models are built in, by name (wan2.2-i2v-a14b, wan2.1-t2v-1.3b and so on) or hub id; nothing is downloaded or loaded, and no shards are needed. All numbers are per process. Only tensors are counted: leave 1 or 2 GiB for CUDA itself.

    Next: wantrain distill, with the same options
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, DATA, OUTPUT, LORA, OPTIMIZER, DEVICE, PROCESSES)

    model: Model = DEFAULT_MODEL
    method: Annotated[Literal["distill", "regression", "lora", "synthesize"], typer.Option(help="Command to plan for, or `distill --method regression`, which has no critic.", rich_help_panel=INPUT)] = "distill"
    gpu_memory: Annotated[float | None, typer.Option(metavar="GiB", min=0, help="GPU memory in GiB; marks the first options that fit.", show_default="none", rich_help_panel=INPUT)] = None
    fix_sample_size: Annotated[tuple[int, int], typer.Option(metavar="H W", help="Height and width of the clips, in pixels.", rich_help_panel=DATA)] = (480, 832)
    video_sample_n_frames: Annotated[int, typer.Option("--video-sample-n-frames", "--frames", metavar="N", min=1, help="Frames of the clips: 1, 5, 9 and so on.", rich_help_panel=DATA)] = 81
    train_batch_size: TrainBatchSize = 1
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, in bytes.", show_default="off", rich_help_panel=OUTPUT)] = False
    rank: Rank = 64
    target_name: TargetName = "q,k,v,ffn.0,ffn.2"
    lora_skip_name: LoraSkipName = ""
    ema_decay: EmaDecay = 0.0
    strategy: Annotated[StrategyName | None, typer.Option(help="How processes share the work: ddp keeps the whole model in each; fsdp and zero3 shard it across them, zero2 only the optimizer.", show_default="ddp for several processes, single for one", rich_help_panel=PROCESSES)] = None
    num_processes: Annotated[int, typer.Option(metavar="N", min=1, help="Processes of the run over all machines, one per GPU.", rich_help_panel=PROCESSES)] = 1
