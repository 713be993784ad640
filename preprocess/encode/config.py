"""The settings of one encode run, checked once at the edge."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from preprocess.dataset.clips import Clips
from preprocess.dataset.sizes import LARGEST_SIZE, SMALLEST_SIZE
from preprocess.encode.ranks import Rank, this_rank
from shared.device import default_device
from shared.errors import UserError
from shared.io.mirror import mirror_of
from shared.models.spec import Mode, ModelSpec

_MODES: dict[str, Mode] = {"normal": "t2v", "i2v": "i2v", "ti2v": "ti2v"}

StoredDtype = Literal["bf16", "fp32"]
TrainMode = Literal["normal", "i2v", "ti2v"]

DEFAULT_STRIDE = 2


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """One `wanprep encode`. Raises UserError, naming the option, for values that cannot work."""

    model: str
    """Toy name, local folder, or hub id."""
    data_dir: Path
    metadata: Path | None
    """JSON list of entries; None: `metadata.json` in `data_dir`, else its media files."""
    output: Path
    image_size: int
    """Bucket size of images: 512 is the base table, 640 people call 480P."""
    video_size: int
    stride: int
    """Every stride-th source frame is taken."""
    frames: int
    """Most frames of a clip, 4n+1."""
    negative_prompt: str
    seed: int
    dtype: StoredDtype
    """Of the tensors in the shards."""
    vae_dtype: StoredDtype
    text_encoder_dtype: StoredDtype
    shard_size_mb: int
    """A shard is closed once it holds this many megabytes (10⁶ bytes)."""
    max_bad: int
    """Samples that may be rejected without the command failing."""
    device: str
    workers: int
    """Processes that decode media."""
    decode_timeout: float
    """Seconds after which a file that is being decoded is given up."""
    rank: Rank = field(default_factory=Rank)
    """This process's share of the work."""
    dataset_config: Path | None = None
    """TOML of several datasets, instead of `data_dir` and `metadata`."""
    prune: bool = False
    """Remove samples from the cache that the dataset does not give any more."""
    token_size: int = 640
    """With `token_budget`: the size at which a clip of `frames` just fills it."""
    token_budget: bool = False
    """training_with_video_token_length: larger sizes get fewer frames."""
    adapt: bool = False
    """random_hw_adapt: sizes are drawn, not fixed."""
    buckets: bool = True
    """enable_bucket: the nearest aspect ratio; False: squares."""
    fixed_size: tuple[int, int] | None = None
    """fix_sample_size, (height, width)."""
    ratio_crop: bool = False
    """random_ratio_crop: a drawn aspect ratio."""
    fps: float | None = None
    """Frames a second that are taken, in place of `stride`."""
    clips: Clips = "random"
    clips_per_video: int = 1
    variants: int = 1
    """How often all that is drawn is drawn for each medium."""
    video_repeat: int = 1
    """How often an epoch shows a video, times what its dataset says."""
    train_mode: TrainMode | None = None
    """None: as the model is."""
    validation_prompts: Path | None = None
    """List of what training will sample; None: the cache's list stays as it is."""

    engine: Literal["local", "ray"] = "local"
    """Where the encoders run: in this process, or in actors of a Ray cluster."""
    ray_address: str | None = None
    """HOST:PORT of a head node; None: a cluster of this machine alone (`ray_cluster.LOCAL`)."""
    ray_actors: int | None = None
    """Actors at most; None: as many as the cluster has room for."""

    def __post_init__(self) -> None:
        sizes = {"image": self.image_size, "video": self.video_size, "token": self.token_size}
        for option, size in sizes.items():
            if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
                raise UserError(
                    f"--size or --{option}-sample-size: {size} is not between {SMALLEST_SIZE} and "
                    f"{LARGEST_SIZE}; 640 gives 480P, 960 gives 720P."
                )
        if self.frames < 1 or self.frames % 4 != 1:
            below = max(1, (self.frames - 1) // 4 * 4 + 1)
            nearest = min((below, below + 4), key=lambda valid: abs(valid - self.frames))
            raise UserError(
                f"--video-sample-n-frames: {self.frames} is not of the form 4n+1 "
                f"(1, 5, 9, … 81); the nearest that is: {nearest}."
            )
        if self.dataset_config is not None and self.metadata is not None:
            raise UserError(
                f"--dataset-config: {self.dataset_config} and --train-data-meta (or "
                f"DATASET_META_NAME) {self.metadata} are both given, expected one of them. A "
                'dataset of the TOML file may name a list: metadata = "FILE".'
            )
        if self.engine == "ray" and self.rank.world > 1:
            raise UserError(
                f"--engine ray: started as rank {self.rank.number} of {self.rank.world}. Ray "
                "shares the work out by itself: start one process, without torchrun or srun."
            )
        if self.engine == "ray" and (self.ray_address or "").startswith("ray://"):
            raise UserError(
                f"--ray-address: {self.ray_address} is a Ray Client's; expected HOST:PORT of the "
                "head node, and the command run on one of the cluster's nodes."
            )
        if self.engine == "ray" and (mirror := mirror_of(self.output)) is not None:
            raise UserError(
                f"--engine ray: --output is {mirror.url}, and embeddings wait in it for the other "
                "actors. Expected a folder that all nodes share; ranks (torchrun, srun) write to "
                "object stores."
            )
        if self.engine == "local" and self.ray_actors is not None:
            raise UserError(f"--ray-actors: {self.ray_actors} without --engine ray. Add that.")
        at_least = {
            "--ray-actors": (1 if self.ray_actors is None else self.ray_actors, 1),
            "--video-sample-stride": (self.stride, 1),
            "--shard-size-mb": (self.shard_size_mb, 1),
            "--max-bad": (self.max_bad, 0),
            "--variants": (self.variants, 1),
            "--clips-per-video": (self.clips_per_video, 1),
            "--video-repeat": (self.video_repeat, 1),
            "--num-workers": (self.workers, 1),
        }
        for option, (value, least) in at_least.items():
            if value < least:
                raise UserError(f"{option}: {value} is too small; expected at least {least}.")
        self._check_shapes()
        self._check_clips()
        if not self.decode_timeout > 0:
            raise UserError(
                f"--decode-timeout: {self.decode_timeout:g} is no time; expected seconds above 0."
            )

    def _check_shapes(self) -> None:
        if self.fixed_size is not None:
            if not all(SMALLEST_SIZE <= side <= LARGEST_SIZE for side in self.fixed_size):
                raise UserError(
                    f"--fix-sample-size: {self.fixed_size[0]} {self.fixed_size[1]} is not a height "
                    f"and a width between {SMALLEST_SIZE} and {LARGEST_SIZE} pixels."
                )
            if self.ratio_crop or not self.buckets:
                other = "--random-ratio-crop" if self.ratio_crop else "--no-enable-bucket"
                raise UserError(
                    f"--fix-sample-size and {other} are both given, expected one of them: a size "
                    "that is fixed leaves no shape to choose."
                )
        if self.ratio_crop and not self.buckets:
            raise UserError(
                "--random-ratio-crop and --no-enable-bucket are both given, expected one of them: "
                "squares have one ratio."
            )
        if (
            self.adapt
            and self.token_budget
            and self.fixed_size is None
            and self.image_size < self.video_size
        ):
            raise UserError(
                f"--image-sample-size: {self.image_size} is smaller than --video-sample-size "
                f"{self.video_size}. With --random-hw-adapt and --training-with-video-token-length "
                "sizes are drawn from --video-sample-size up to --image-sample-size; set both to "
                "one value for a fixed size."
            )

    def _check_clips(self) -> None:
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"--fps: {self.fps:g} is no frame rate; expected a number above 0.")
        if self.clips_per_video > 1 and self.clips in ("first", "chunk"):
            raise UserError(
                f"--clips-per-video: {self.clips_per_video} has no meaning with --clips "
                f"{self.clips}; it goes with --clips random or uniform."
            )


def config_of(
    *,
    train_data_dir: Path,
    train_data_meta: Path | None,
    size: int,
    image_sample_size: int | None,
    video_sample_size: int | None,
    token_sample_size: int | None,
    enable_bucket: bool,
    random_hw_adapt: bool,
    training_with_video_token_length: bool,
    fix_sample_size: tuple[int, int] | None,
    random_ratio_crop: bool,
    video_sample_stride: int | None,
    video_sample_n_frames: int,
    vae_mini_batch: int,
    device: str,
    num_workers: int | None,
    engine: Literal["local", "ray"] = "local",
    **same: Any,
) -> EncodeConfig:
    """The settings as the command line names them; those in `same` have one name everywhere.

    Raises UserError, naming the option.
    """
    from preprocess.media.worker_pool import default_workers

    if same["fps"] is not None and video_sample_stride is not None:
        raise UserError(
            f"--fps {same['fps']:g} and --video-sample-stride {video_sample_stride} are both "
            "given, expected one of them: each says which frames are taken."
        )
    if vae_mini_batch < 1:
        raise UserError(f"--vae-mini-batch: {vae_mini_batch} is too small; expected at least 1.")
    rank = this_rank()
    return EncodeConfig(
        data_dir=train_data_dir,
        metadata=train_data_meta,
        image_size=size if image_sample_size is None else image_sample_size,
        video_size=size if video_sample_size is None else video_sample_size,
        token_size=size if token_sample_size is None else token_sample_size,
        buckets=enable_bucket,
        adapt=random_hw_adapt,
        token_budget=training_with_video_token_length,
        fixed_size=fix_sample_size,
        ratio_crop=random_ratio_crop,
        stride=DEFAULT_STRIDE if video_sample_stride is None else video_sample_stride,
        frames=video_sample_n_frames,
        # A cluster's nodes may have what this machine lacks.
        device=rank.device(default_device()) if (device, engine) == ("auto", "local") else device,
        engine=engine,
        workers=default_workers(rank.local_world) if num_workers is None else num_workers,
        rank=rank,
        **same,
    )


def in_train_mode(
    spec: ModelSpec, train_mode: Literal["normal", "i2v", "ti2v"] | None
) -> ModelSpec:
    """The model as it is to be encoded for; None: as it is.

    `normal` makes text-to-video of an i2v model: no conditions are encoded. Raises UserError for a
    mode that the model does not have.
    """
    if train_mode is None or _MODES[train_mode] == spec.mode:
        return spec
    if (train_mode, spec.mode) == ("normal", "i2v"):
        return replace(spec, mode="t2v", image_dim=None)
    if (train_mode, spec.mode) == ("normal", "ti2v"):  # its shards hold nothing but what t2v needs
        return spec
    own = next(name for name, mode in _MODES.items() if mode == spec.mode)
    raise UserError(
        f"--train-mode: {train_mode}, but {spec.folder} is a model for {spec.mode}; expected "
        f"{own}. Leave the option out, or choose another model with "
        "--pretrained-model-name-or-path (or MODEL_NAME)."
    )
