"""The settings of one encode run, checked once at the edge."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from preprocess.ranks import Rank
from shared.errors import UserError

StoredDtype = Literal["bf16", "fp32"]

# The smallest size whose base bucket still gives a few latents a side; the largest that Wan knows
# is 960 (720P), and four times that is a typing error.
SMALLEST_SIZE, LARGEST_SIZE = 32, 4096


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

    def __post_init__(self) -> None:
        for option, size in (("image", self.image_size), ("video", self.video_size)):
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
        at_least = {
            "--video-sample-stride": (self.stride, 1),
            "--shard-size-mb": (self.shard_size_mb, 1),
            "--max-bad": (self.max_bad, 0),
            "--num-workers": (self.workers, 1),
        }
        for option, (value, least) in at_least.items():
            if value < least:
                raise UserError(f"{option}: {value} is too small; expected at least {least}.")
        if not self.decode_timeout > 0:
            raise UserError(
                f"--decode-timeout: {self.decode_timeout:g} is no time; expected seconds above 0."
            )
