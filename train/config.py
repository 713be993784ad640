"""The configuration of a run: built by the command line, checked here, then frozen."""

from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Literal

from shared.cli.checks import ABOVE_0, FROM_0, WHOLE, check_option
from shared.cli.videox_fun_command import Given
from shared.errors import UserError
from train.data.batch_plan import Tail
from train.data.filters import Condition
from train.data.weighted_folder import WeightedFolder
from train.distributed.placement import Placement
from train.functional.schedule import Expert, ScoreFloor
from train.memory.options import MemoryOptions
from train.methods.dmd import Maths, Pairing, Start
from train.methods.flow_matching import TimestepSampling
from train.model.attention import check_name
from train.model.base import Base
from train.optim.lr_schedule import LEAST_POLYNOMIAL_RATE, LrScheduler
from train.tracking.trackers import chosen

TrainMode = Literal["normal", "i2v", "ti2v"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every run has, whatever it learns. Names and defaults are the seed document's.

    None means: decided by the model.
    """

    # What is trained, on what
    model: str
    base: Base
    init_lora: Path | None
    """LoRA file that the LoRA begins as."""
    shards: tuple[WeightedFolder, ...]
    where: tuple[Condition, ...]
    """Only samples that fulfil all of them."""
    captions: str | None
    """Name of captions that `wanprep recaption` made; None: the shards' own."""
    output_dir: Path
    boundary_type: Expert | None
    """None: `low` where the model has two experts, else `full`."""
    train_mode: TrainMode | None
    """What the model must be for; `normal` with a ti2v model shows all clips as text to video."""
    encoded_as: Given
    """Flags of `wanprep encode` that were given: the shards must be so."""
    seed: int

    # Length and saving; a *step* of these is an update of the LoRA that the run is for
    max_train_steps: int | None
    """None: `num_train_epochs` decides."""
    num_train_epochs: int
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    """Checkpoints that are kept, the newest; None: all."""
    resume_from_checkpoint: str | None
    save_precision: Literal["bf16", "fp32"]

    # What people see of it
    report_to: tuple[str, ...]
    """Trackers by accelerate's names, and csv."""
    logging_dir: Path | None
    """None: `logs` in the output folder."""
    tracker_project_name: str
    validation_steps: int | None
    """Updates of the LoRA from one validation to the next; None or 0: none."""

    # LoRA and optimizer
    flow_shift: float | None
    rank: int
    network_alpha: float
    target_name: tuple[str, ...]
    lora_skip_name: tuple[str, ...]
    """Parts of names of layers that get none, though `target_name` has them."""
    ema_decay: float
    """Of the average of the LoRA that is exported; 0: the last weights are."""
    ema_start: int
    """Updates of the LoRA before the average begins."""
    learning_rate: float
    lr_warmup_steps: int
    """Updates of a role over which its learning rate rises from 0."""
    lr_scheduler: LrScheduler
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    adam_epsilon: float
    max_grad_norm: float

    # Data and device
    train_batch_size: int
    gradient_accumulation_steps: int
    video_repeat: int | None
    """None: as the shards say."""
    caption_dropout: float
    random_frame_crop: bool
    """Show the beginning of clips only in one update of ten."""
    tail: Tail
    dataloader_num_workers: int
    memory: MemoryOptions
    allow_tf32: bool
    compile: bool
    """torch.compile for the transformer's blocks."""
    attention_backend: str
    """By diffusers' name."""
    placement: Placement

    def __post_init__(self) -> None:
        at_least_one = (
            "num_train_epochs",
            "checkpointing_steps",
            "rank",
            "train_batch_size",
            "gradient_accumulation_steps",
        )
        for name in at_least_one:
            check_option(name, getattr(self, name), getattr(self, name) >= 1, WHOLE)
        paths = [folder.path.resolve() for folder in self.shards]
        for folder, path in zip(self.shards, paths, strict=True):
            if paths.count(path) > 1:
                raise UserError(
                    f"--shards: {folder.path} is given {paths.count(path)} times. Give it once, "
                    f"with a weight if it shall count more: {folder.path}@{paths.count(path)}"
                )
        for name in ("max_train_steps", "checkpoints_total_limit", "video_repeat"):
            if (limit := getattr(self, name)) is not None:
                check_option(name, limit, limit >= 1, WHOLE)
        for name in ("network_alpha", "learning_rate", "max_grad_norm"):
            check_option(name, getattr(self, name), 0 < getattr(self, name) < inf, ABOVE_0)
        self._check_rate("learning_rate", self.learning_rate)
        if self.flow_shift is not None:
            check_option("flow_shift", self.flow_shift, 0 < self.flow_shift < inf, ABOVE_0)
        check_option("target_name", "''", bool(self.target_name), "names of layers, e.g. q,k,v")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            check_option(name, value, 0 <= value < 1, "a number in [0, 1)")
        from_zero = (
            "dataloader_num_workers",
            "lr_warmup_steps",
            "ema_start",
            "validation_steps",
            "adam_weight_decay",
            "adam_epsilon",
        )
        for name in from_zero:
            check_option(name, getattr(self, name), 0 <= (getattr(self, name) or 0) < inf, FROM_0)
        chosen(self.report_to)
        check_name(self.attention_backend)
        self._check_compile()
        dropout = self.caption_dropout
        check_option("caption_dropout", dropout, 0 <= dropout <= 1, "a share in [0, 1]")

    def _check_compile(self) -> None:
        if self.compile and self.memory.strategy == "zero3":
            raise UserError(
                "--compile: found with --strategy zero3, where DeepSpeed gathers the weights of "
                "layers in the midst of a block. Use --strategy fsdp, or leave --compile out."
            )

    def _check_rate(self, name: str, rate: float) -> None:
        if self.lr_scheduler == "polynomial":
            least = LEAST_POLYNOMIAL_RATE
            expected = f"more than {least:g}, where --lr-scheduler polynomial ends"
            check_option(name, rate, rate > least, expected)

    @property
    def update_batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.placement.mesh.data

    @property
    def device(self) -> str:
        """Of this process."""
        return self.placement.device


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """`wantrain lora`."""

    timestep_sampling: TimestepSampling
    logit_mean: float | None
    logit_std: float | None
    """Of the normal behind `logit-normal`; None: 0 and 1. Both None for `uniform`."""
    uniform_sampling: bool
    """Spread the levels of an update's samples evenly over that distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logit_mean", "logit_std"):
            if (value := getattr(self, name)) is None:
                continue
            if self.timestep_sampling != "logit-normal":
                raise UserError(
                    f"--{name.replace('_', '-')}: found {value:g} with --timestep-sampling "
                    f"{self.timestep_sampling}; it is of logit-normal alone. Leave it out, or add "
                    "--timestep-sampling logit-normal."
                )
            fine = isfinite(value) and (name == "logit_mean" or value > 0)
            check_option(name, value, fine, ABOVE_0 if name == "logit_std" else "a number")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """`wantrain distill`. What is not in the seed document says so."""

    denoising_step_indices_list: tuple[float, ...]
    recipe: Maths
    start: Start | None
    """None: `latents` for the low-noise expert, else `noise`."""
    pairing: Pairing
    score_floor: ScoreFloor
    uniform_sampling: bool
    """Spread the score levels of an update's samples evenly over the interval."""
    real_guidance_scale: float
    fake_guidance_scale: float
    gen_update_interval: int
    """Critic updates before each generator update."""
    fm_loss_weight: float
    """Of flow matching on the cached latents in the generator's loss; 0: DMD alone."""
    learning_rate_critic: float
    batched_guidance: bool
    """Teacher (and critic) with and without caption in one pass of twice the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        interval, rate = self.gen_update_interval, self.learning_rate_critic
        check_option("gen_update_interval", interval, interval >= 1, WHOLE)
        check_option("learning_rate_critic", rate, 0 < rate < inf, ABOVE_0)
        self._check_rate("learning_rate_critic", rate)
        for name in ("fm_loss_weight", "real_guidance_scale", "fake_guidance_scale"):
            check_option(name, getattr(self, name), 0 <= getattr(self, name) < inf, FROM_0)
        if self.recipe == "seed" and (self.start == "latents" or self.score_floor != "boundary"):
            chosen = "--start latents" if self.start == "latents" else "--score-floor handover"
            raise UserError(
                f"--recipe: found seed with {chosen}, but the seed's recipe starts from noise and "
                f"ends its score levels at the boundary. Leave out one of the two."
            )
