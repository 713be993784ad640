"""The options of `wanprep encode`: type, default, unit, help, group and check of each, once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import typer

from preprocess.dataset.sizes import LARGEST_SIZE, SMALLEST_SIZE, Clips
from shared.cache.ranks import Rank
from shared.cli.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check_options
from shared.cluster.options import CLUSTER, WithRay
from shared.device import default_device
from shared.errors import UserError
from shared.models.family import TrainMode
from shared.models.spec import DEFAULT_MODEL, ModelSpec, in_train_mode
from shared.models.wan import WAN

StoredDtype = Literal["bf16", "fp32"]

DEFAULT_STRIDE = 2
INPUT, SAMPLES, ENCODERS = "Input", "What a sample is", "Encoders"
OUTPUT, PLAN = "Output", "Plan"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class EncodeConfig(WithRay):
    """Encode videos, images and captions into shards, once.

    The model's VAE and text encoder turn a sample into latents, text embeddings and, for i2v models, the first frame's condition. Interrupted and run again, it continues; with nothing to do, it ends at once.

    Next: wantrain distill --shards DIR
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, SAMPLES, ENCODERS, OUTPUT, CLUSTER)

    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the shards are for: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL
    train_data_dir: Annotated[str, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder of videos and images, where relative paths in the list start; or WebDataset tars: a folder of them, one, or a quoted pattern such as 'clips/{000..099}.tar'.", rich_help_panel=INPUT)] = "datasets"
    train_data_meta: Annotated[str | None, typer.Option(metavar="FILE|URL", envvar="DATASET_META_NAME", help="List of media and captions, .json, .jsonl or .csv: an entry has a path (file_path, video_path, image_path or file_name), a caption (text, caption or captions: one, or a list) and perhaps a type (video or image). Or a list of captions without media: entries without a path, or .txt with one a line.", show_default="metadata.json, .jsonl or .csv in the data folder, else a.txt beside a.mp4", rich_help_panel=INPUT)] = None
    dataset_config: Annotated[Path | None, typer.Option(metavar="FILE", help="Several datasets in one TOML file, as for musubi-tuner or diffusion-pipe, in place of --train-data-dir; each may have its own sizes, frames and num_repeats.", show_default="one dataset", rich_help_panel=INPUT)] = None

    size: Annotated[int, typer.Option(metavar="PX", help="Size of images and videos: the side, in pixels, of a square of the same area; 320 is 240P, 480 is 320P, 640 is 480P, 960 is 720P.", rich_help_panel=SAMPLES)] = 640
    image_sample_size: Annotated[int | None, typer.Option(metavar="PX", help="Size of images, in pixels, defined as for --size; the upper limit of random sizes.", show_default="--size", rich_help_panel=SAMPLES)] = None
    video_sample_size: Annotated[int | None, typer.Option(metavar="PX", help="Size of videos, in pixels, defined as for --size; with random sizes the lower limit, or 512.", show_default="--size", rich_help_panel=SAMPLES)] = None
    token_sample_size: Annotated[int | None, typer.Option(metavar="PX", help="Token budget of a clip: the size, in pixels, at which a clip of all frames just fits it; used by the token length option below.", show_default="--size", rich_help_panel=SAMPLES)] = None
    enable_bucket: Annotated[bool, typer.Option("--enable-bucket/--no-enable-bucket", help="Resize each sample to the nearest of 41 aspect ratios; off: to a square, cropped at the centre.", show_default="on", rich_help_panel=SAMPLES)] = True
    random_hw_adapt: Annotated[bool, typer.Option("--random-hw-adapt", help="Draw each sample's size at random: videos from 512 to the size of videos, images from that to the size of images.", show_default="off", rich_help_panel=SAMPLES)] = False
    training_with_video_token_length: Annotated[bool, typer.Option("--training-with-video-token-length", help="Take fewer frames at larger sizes, so that each clip stays within the token budget; random sizes then go from that of videos to that of images in steps of 128.", show_default="off", rich_help_panel=SAMPLES)] = False
    fix_sample_size: Annotated[tuple[int, int] | None, typer.Option(metavar="H W", help="Height and width of every sample, in pixels, in place of sizes, buckets and the two options above.", show_default="off", rich_help_panel=SAMPLES)] = None
    random_ratio_crop: Annotated[bool, typer.Option("--random-ratio-crop", help="Draw each sample's aspect ratio at random, from 1:2.4 to 2.4:1, instead of taking the nearest; the rest of the frame is cropped.", show_default="off", rich_help_panel=SAMPLES)] = False
    video_sample_stride: Annotated[int | None, typer.Option(metavar="N", help="Take one of every N frames of a video.", show_default="2", rich_help_panel=SAMPLES), AT_LEAST_1] = None
    fps: Annotated[float | None, typer.Option("--fps", metavar="F", help="Take F frames of each second of a video, those nearest in time, in place of every N-th; frames of a slower video are repeated.", show_default="--video-sample-stride", rich_help_panel=SAMPLES), POSITIVE] = None
    video_sample_n_frames: Annotated[int, typer.Option(metavar="N", help="Maximum number of frames of a clip after the stride, of the form 4n+1; a shorter video gives its largest 4n+1.", rich_help_panel=SAMPLES)] = 81
    clips: Annotated[Clips, typer.Option("--clips", help="Where clips start in a video: at its first frame, at random, spread evenly, or one after another over the whole video.", rich_help_panel=SAMPLES)] = "random"
    clips_per_video: Annotated[int, typer.Option(metavar="N", help="Number of clips of each video, with --clips random or uniform.", rich_help_panel=SAMPLES), AT_LEAST_1] = 1
    variants: Annotated[int, typer.Option(metavar="K", help="Encode each file K times with other random sizes, ratios and starts; equal results are stored once.", rich_help_panel=SAMPLES), AT_LEAST_1] = 1
    video_repeat: Annotated[int, typer.Option(metavar="N", help="How often an epoch of training shows each video (images: once); can be changed later without encoding again.", rich_help_panel=SAMPLES), AT_LEAST_1] = 1
    train_mode: Annotated[TrainMode | None, typer.Option("--train-mode", help="What the shards are for: flf2v is first and last frame, with Wan 2.2 I2V-A14B, too; normal with an i2v model leaves the conditions out.", show_default="the model's", rich_help_panel=SAMPLES)] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of clip starts, sizes and aspect ratios.", rich_help_panel=SAMPLES)] = 42

    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="Negative prompt of the teacher's CFG; encoded once for the whole cache.", show_default="Wan's published one", rich_help_panel=ENCODERS)] = WAN.negative_prompt
    validation_prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Validation prompts, sampled during training: .txt with one a line, optionally ending in --w 832 --h 480 --f 81 --i cat.png, or .json, .jsonl or .csv with prompt and optionally image, width, height, frames. An i2v model needs an image for each, flf2v also a last one (last_image, --ei). Replaces the list in the shards.", show_default="the list in the shards", rich_help_panel=ENCODERS)] = None
    vae_dtype: Annotated[StoredDtype, typer.Option(help="Compute dtype of the VAE.", rich_help_panel=ENCODERS)] = "fp32"
    text_encoder_dtype: Annotated[StoredDtype, typer.Option(help="Compute dtype of the text encoder.", rich_help_panel=ENCODERS)] = "bf16"
    vae_mini_batch: Annotated[int, typer.Option(metavar="N", help="Accepted for VideoX-Fun's scripts, no effect: clips are encoded one at a time, because batching changes the bits of the latents.", rich_help_panel=ENCODERS), AT_LEAST_1] = 1
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=ENCODERS)] = "auto"
    num_workers: Annotated[int | None, typer.Option(metavar="N", help="Processes that decode and resize media while the encoders work (with Ray: of each actor); each holds one clip in memory.", show_default="cores minus 1, at most 8", rich_help_panel=ENCODERS), AT_LEAST_1] = None
    decode_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Reject a file if no frame of it was decoded for this long.", rich_help_panel=ENCODERS), POSITIVE] = 120

    output: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards; what is in it already is kept and not encoded again.", rich_help_panel=OUTPUT)] = "shards"
    dtype: Annotated[StoredDtype, typer.Option(help="Dtype of the tensors in the shards.", rich_help_panel=OUTPUT)] = "bf16"
    shard_size_mb: Annotated[int, typer.Option(metavar="MB", help="Size, in megabytes, at which a shard is closed and the next one started.", rich_help_panel=OUTPUT), AT_LEAST_1] = 256
    prune: Annotated[bool, typer.Option("--prune", help="Remove samples from the shards that are no longer in the dataset: of files that were removed, or whose frames or size changed.", show_default="off", rich_help_panel=OUTPUT)] = False
    max_bad: Annotated[int, typer.Option(metavar="N", help="Number of rejected samples to accept; with more the exit code is 1. The others are encoded in any case.", rich_help_panel=OUTPUT), NOT_NEGATIVE] = 0
    # fmt: on

    @property
    def workers(self) -> int:
        """Processes that decode media."""
        from preprocess.media.worker_pool import default_workers

        return self.num_workers or default_workers(self.rank.local_world)

    @property
    def stride(self) -> int:
        """Every stride-th source frame is taken, but see `fps`."""
        return self.video_sample_stride or DEFAULT_STRIDE

    @property
    def image_size(self) -> int:
        """Bucket size of images: 512 is the base table, 640 people call 480P."""
        return self.size if self.image_sample_size is None else self.image_sample_size

    @property
    def video_size(self) -> int:
        """The same of videos."""
        return self.size if self.video_sample_size is None else self.video_sample_size

    @property
    def token_size(self) -> int:
        """With `training_with_video_token_length`: at which a clip of all frames just fills it."""
        return self.size if self.token_sample_size is None else self.token_sample_size

    def __post_init__(self) -> None:
        if self.fps is not None and self.video_sample_stride is not None:
            raise UserError(
                f"--fps {self.fps:g} and --video-sample-stride {self.video_sample_stride} are both "
                "given, expected one of them: each says which frames are taken."
            )
        check_options(self)
        sizes = {"image": self.image_size, "video": self.video_size, "token": self.token_size}
        for option, size in sizes.items():
            if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
                raise UserError(
                    f"--size or --{option}-sample-size: {size} is not between {SMALLEST_SIZE} and "
                    f"{LARGEST_SIZE}; 640 gives 480P, 960 gives 720P."
                )
        if self.video_sample_n_frames < 1 or self.video_sample_n_frames % 4 != 1:
            below = max(1, (self.video_sample_n_frames - 1) // 4 * 4 + 1)
            nearest = min((below, below + 4), key=lambda valid: abs(valid - self.video_sample_n_frames))
            raise UserError(
                f"--video-sample-n-frames: {self.video_sample_n_frames} is not of the form 4n+1 "
                f"(1, 5, 9, … 81); the nearest that is: {nearest}."
            )
        if self.dataset_config is not None and self.train_data_meta is not None:
            raise UserError(
                f"--dataset-config: {self.dataset_config} and --train-data-meta (or "
                f"DATASET_META_NAME) {self.train_data_meta} are both given, expected one of them. A "
                'dataset of the TOML file may name a list: metadata = "FILE".'
            )
        self.check_engine(self.output, waiting="embeddings")
        if self.clips_per_video > 1 and self.clips in ("first", "chunk"):
            raise UserError(
                f"--clips-per-video: {self.clips_per_video} has no meaning with --clips "
                f"{self.clips}; it goes with --clips random or uniform."
            )
        self._check_shapes()

    def _check_shapes(self) -> None:
        if self.fix_sample_size is not None:
            if not all(SMALLEST_SIZE <= side <= LARGEST_SIZE for side in self.fix_sample_size):
                raise UserError(
                    f"--fix-sample-size: {self.fix_sample_size[0]} {self.fix_sample_size[1]} is not a height "
                    f"and a width between {SMALLEST_SIZE} and {LARGEST_SIZE} pixels."
                )
            if self.random_ratio_crop or not self.enable_bucket:
                other = "--random-ratio-crop" if self.random_ratio_crop else "--no-enable-bucket"
                raise UserError(
                    f"--fix-sample-size and {other} are both given, expected one of them: a size "
                    "that is fixed leaves no shape to choose."
                )
        if self.random_ratio_crop and not self.enable_bucket:
            raise UserError(
                "--random-ratio-crop and --no-enable-bucket are both given, expected one of them: "
                "squares have one ratio."
            )
        if (
            self.random_hw_adapt
            and self.training_with_video_token_length
            and self.fix_sample_size is None
            and self.image_size < self.video_size
        ):
            raise UserError(
                f"--image-sample-size: {self.image_size} is smaller than --video-sample-size "
                f"{self.video_size}. With --random-hw-adapt and --training-with-video-token-length "
                "sizes are drawn from --video-sample-size up to --image-sample-size; set both to "
                "one value for a fixed size."
            )


# fmt: off
@dataclass(frozen=True, kw_only=True)
class PlanConfig(EncodeConfig):
    """Show what `wanprep encode` would do with the same options.

    Prints the samples by shape, how many are in the shards already, what is rejected, shortened or upscaled and why, and the disk space and time needed. Media are probed as by encode; no encoder is loaded (except with --measure), and nothing is written to the output folder. The exit code is 1 where more than --max-bad would be rejected.

    Next: wanprep encode, with the same options
    """

    PANELS: ClassVar[Sequence[str]] = (*EncodeConfig.PANELS, PLAN)

    measure: Annotated[bool, typer.Option("--measure", help="Encode a few clips and captions first, to estimate the time; only the measured speed is kept.", show_default="off", rich_help_panel=PLAN)] = False
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, with every file named.", show_default="off", rich_help_panel=PLAN)] = False
    # fmt: on


_Config = TypeVar("_Config", bound=EncodeConfig)


def for_this_machine(config: _Config) -> _Config:
    """With the device and the number of workers that their defaults mean here.

    The device stays open with Ray: a cluster's nodes may have what this machine lacks.
    """
    device = config.device
    if config.engine == "local":
        device = device_here(device, config.rank)
    return replace(config, device=device, num_workers=config.workers)


def device_here(device: str, rank: Rank) -> str:
    """What --device means in this process: auto is a GPU where there is one, of its own number."""
    return rank.device(default_device()) if device == "auto" else device


def encoded_for(spec: ModelSpec, train_mode: TrainMode | None) -> ModelSpec:
    """The model as it is to be encoded for; None: as it is.

    `normal` makes text-to-video of an i2v model: no conditions are encoded. Raises UserError for a
    mode that the model does not have.
    """
    if train_mode == "normal" and spec.given_frames:
        return replace(spec, mode="t2v", image_dim=None)
    return in_train_mode(spec, train_mode)
