"""`wanprep`: the command line of stage one. Heavy imports wait until a command runs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from preprocess.cli import edit, inspect, overlays, plan
from preprocess.cli.locations import media_folder, metadata_file, shards_folder
from shared.cli.support import Command, echo, new_app, run
from shared.cli.videox_fun_command import SeedCommand, with_seed_flags
from shared.errors import UserError
from shared.interrupt import SIGNAL_EXIT
from shared.io.names import quoted
from shared.models.spec import DEFAULT_MODEL
from shared.models.wan import WAN

PROGRAM_EXAMPLES = """
# encode datasets/ for Wan2.2-I2V-A14B, then train on the shards
wanprep encode
wantrain distill

# everything that a command takes
wanprep encode --help
"""
ENCODE_EXAMPLES = """
# datasets/ for Wan2.2-I2V-A14B: 480P, 81 frames, every second frame
wanprep encode

# the same at 720P, frames as they come, captions from a list
wanprep encode --model Wan-AI/Wan2.2-I2V-A14B-Diffusers --size 960 \\
    --train-data-dir my/clips --train-data-meta my/captions.csv \\
    --video-sample-stride 1 --output shards-720p

# the bundled toy model on rendered clips, seconds on a CPU
python scripts/render_clips.py --count 4 --output toy-clips
wanprep encode --model toy --train-data-dir toy-clips --size 64 \\
    --video-sample-n-frames 17 --video-sample-stride 1 --output toy-shards
"""
INDEX_EXAMPLES = """
# the shards in shards/
wanprep index

# shards for Wan2.2-I2V-A14B that were copied from another machine
wanprep index --shards shards-720p

# the shards of the bundled toy model
wanprep index --shards toy-shards
"""

app = new_app(
    "Encode videos and images with captions, once, into shards that `wantrain` reads.",
    PROGRAM_EXAMPLES,
)

INPUT, SAMPLES, ENCODERS, OUTPUT, CLUSTER = (
    "Input",
    "What a sample is",
    "Encoders",
    "Output",
    "Cluster",
)
Dtype = Literal["bf16", "fp32"]


@app.callback()
def wanprep() -> None:
    """Keeps `encode` a subcommand whatever other commands there are."""


# fmt: off
def encode(
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that the shards are for: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL,
    train_data_dir: Annotated[Path, typer.Option(parser=media_folder, metavar="DIR|URL", envvar="DATASET_NAME", help="Folder of videos and images, where relative paths in the list start; or WebDataset tars: a folder of them, one, or a quoted pattern such as 'clips/{000..099}.tar'.", rich_help_panel=INPUT)] = Path("datasets"),
    train_data_meta: Annotated[Path | None, typer.Option(parser=metadata_file, metavar="FILE|URL", envvar="DATASET_META_NAME", help="List of media and captions, .json, .jsonl or .csv: an entry has a path (file_path, video_path, image_path or file_name), a caption (text, caption or captions: one, or a list) and perhaps a type (video or image). Or a list of captions without media: entries without a path, or .txt with one a line.", show_default="metadata.json, .jsonl or .csv in the data folder, else a.txt beside a.mp4", rich_help_panel=INPUT)] = None,
    dataset_config: Annotated[Path | None, typer.Option(metavar="FILE", help="Several datasets in one TOML file, as for musubi-tuner or diffusion-pipe, in place of --train-data-dir; each may have its own sizes, frames and num_repeats.", show_default="one dataset", rich_help_panel=INPUT)] = None,

    size: Annotated[int, typer.Option(metavar="PX", help="Size of images and videos: the side, in pixels, of a square of the same area; 320 is 240P, 480 is 320P, 640 is 480P, 960 is 720P.", rich_help_panel=SAMPLES)] = 640,
    image_sample_size: Annotated[int | None, typer.Option(metavar="PX", help="Size of images alone, in pixels, meant as --size is; the largest where sizes are drawn.", show_default="--size", rich_help_panel=SAMPLES)] = None,
    video_sample_size: Annotated[int | None, typer.Option(metavar="PX", help="Size of videos alone, in pixels, meant as --size is; the smallest, or 512, where sizes are drawn.", show_default="--size", rich_help_panel=SAMPLES)] = None,
    token_sample_size: Annotated[int | None, typer.Option(metavar="PX", help="Size, in pixels, at which a clip of all frames has the most tokens that one may have; counts with the token length option below.", show_default="--size", rich_help_panel=SAMPLES)] = None,
    enable_bucket: Annotated[bool, typer.Option("--enable-bucket/--no-enable-bucket", help="Resize each sample to the nearest of 41 aspect ratios; off: to a square, cropped at the centre.", show_default="on", rich_help_panel=SAMPLES)] = True,
    random_hw_adapt: Annotated[bool, typer.Option("--random-hw-adapt", help="Draw each sample's size: a video's between 512 and the size of videos, an image's between that and the size of images.", show_default="off", rich_help_panel=SAMPLES)] = False,
    training_with_video_token_length: Annotated[bool, typer.Option("--training-with-video-token-length", help="Take fewer frames at larger sizes, so that a clip keeps to the tokens of the token size; sizes that are drawn then go from that of videos to that of images in steps of 128.", show_default="off", rich_help_panel=SAMPLES)] = False,
    fix_sample_size: Annotated[tuple[int, int] | None, typer.Option(metavar="H W", help="Height and width of every sample, in pixels, in place of sizes, buckets and the two options above.", show_default="off", rich_help_panel=SAMPLES)] = None,
    random_ratio_crop: Annotated[bool, typer.Option("--random-ratio-crop", help="Draw each sample's aspect ratio, from 1:2.4 to 2.4:1, instead of taking the nearest; what is over is cropped.", show_default="off", rich_help_panel=SAMPLES)] = False,
    video_sample_stride: Annotated[int | None, typer.Option(metavar="N", help="Take one of every N frames of a video.", show_default="2", rich_help_panel=SAMPLES)] = None,
    fps: Annotated[float | None, typer.Option("--fps", metavar="F", help="Take F frames of each second of a video, those nearest in time, in place of every N-th; of a slower video some are taken twice.", show_default="--video-sample-stride", rich_help_panel=SAMPLES)] = None,
    video_sample_n_frames: Annotated[int, typer.Option(metavar="N", help="Most frames of a clip after the stride, of the form 4n+1; a shorter video gives its largest 4n+1.", rich_help_panel=SAMPLES)] = 81,
    clips: Annotated[Literal["first", "random", "uniform", "chunk"], typer.Option("--clips", help="Where clips are cut out of a video: at its start, where the seed says, spread evenly, or the whole of it in consecutive clips.", rich_help_panel=SAMPLES)] = "random",
    clips_per_video: Annotated[int, typer.Option(metavar="N", help="How many clips of a video, with --clips random or uniform.", rich_help_panel=SAMPLES)] = 1,
    variants: Annotated[int, typer.Option(metavar="K", help="Encode each file K times with other random sizes, ratios and starts; equal results are stored once.", rich_help_panel=SAMPLES)] = 1,
    video_repeat: Annotated[int, typer.Option(metavar="N", help="How often an epoch of training shows a video while it shows an image once; changed later without any encoding.", rich_help_panel=SAMPLES)] = 1,
    train_mode: Annotated[Literal["normal", "i2v", "ti2v"] | None, typer.Option("--train-mode", help="What the shards are for; normal with an i2v model leaves the conditions out.", show_default="as the model is", rich_help_panel=SAMPLES)] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed: where in a video a clip starts, random sizes and ratios.", rich_help_panel=SAMPLES)] = 42,

    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="Negative prompt of the teacher's CFG; encoded once for the whole cache.", show_default="Wan's published one", rich_help_panel=ENCODERS)] = WAN.negative_prompt,
    validation_prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="List of prompts that a training run samples on its way: .txt with one a line, perhaps ending in --w 832 --h 480 --f 81 --i cat.png, or .json, .jsonl or .csv with prompt and perhaps image, width, height, frames. An i2v model wants a picture of each. It replaces the list of before.", show_default="the list that the shards have", rich_help_panel=ENCODERS)] = None,
    vae_dtype: Annotated[Dtype, typer.Option(help="Number format that the VAE computes in.", rich_help_panel=ENCODERS)] = "fp32",
    text_encoder_dtype: Annotated[Dtype, typer.Option(help="Number format that the text encoder computes in.", rich_help_panel=ENCODERS)] = "bf16",
    vae_mini_batch: Annotated[int, typer.Option(metavar="N", help="Taken for the sake of VideoX-Fun's scripts: clips go through the VAE one at a time, since together they would get other bits.", rich_help_panel=ENCODERS)] = 1,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=ENCODERS)] = "auto",
    num_workers: Annotated[int | None, typer.Option(metavar="N", help="Processes that decode and resize media while the encoders work; each holds one clip in memory.", show_default="one a core but one, at most 8", rich_help_panel=ENCODERS)] = None,
    decode_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up a file, and list it as rejected, when no frame of it was decoded for so long.", rich_help_panel=ENCODERS)] = 120,

    output: Annotated[Path, typer.Option(parser=shards_folder, metavar="DIR|URL", help="Folder of the shards; what is in it already is kept and not encoded again.", rich_help_panel=OUTPUT)] = Path("shards"),
    dtype: Annotated[Dtype, typer.Option(help="Number format of the tensors in the shards.", rich_help_panel=OUTPUT)] = "bf16",
    shard_size_mb: Annotated[int, typer.Option(metavar="MB", help="Size of a shard, in megabytes, at which the next one is begun.", rich_help_panel=OUTPUT)] = 256,
    prune: Annotated[bool, typer.Option("--prune", help="Remove samples from the shards that are no longer in the dataset: files that were taken out, or whose clips are cut otherwise now.", show_default="off", rich_help_panel=OUTPUT)] = False,
    max_bad: Annotated[int, typer.Option(metavar="N", help="Rejected samples that are accepted; with more the exit code is 1. The others are encoded in any case.", rich_help_panel=OUTPUT)] = 0,

    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where the encoders run: local is this process (or one per GPU under torchrun, accelerate, srun); ray is a Ray cluster, whose nodes may come and go.", rich_help_panel=CLUSTER)] = "local",
    ray_address: Annotated[str | None, typer.Option(metavar="HOST:PORT", envvar="RAY_ADDRESS", help="Head node of the Ray cluster, or auto: the cluster that this machine is part of. Run the command on one of its nodes.", show_default="a cluster of this machine alone", rich_help_panel=CLUSTER)] = None,
    ray_actors: Annotated[int | None, typer.Option(metavar="N", help="Actors at most; each has an encoder, on a GPU of its own if there are any, and decoders (--num-workers).", show_default="as many as there is room for", rich_help_panel=CLUSTER)] = None,
) -> None:
    """Encode videos, images and captions into shards, once.

    The model's VAE and text encoder turn a sample into latents, text embeddings and, for i2v models, the first frame's condition. Interrupted and run again, it continues; with nothing to do, it ends at once.

    Next: wantrain distill --shards DIR
    """
    options = dict(locals())  # nothing but the parameters yet
    from preprocess.encode.config import config_of

    config = config_of(**options)

    from rich.console import Console

    from preprocess.cache.report import contents, preview
    from preprocess.dataset.rejected import rejected_file, rejections
    from preprocess.encode.run import encode as run_encode
    from shared.cli.console import count

    with ExitStack() as held:
        elsewhere = None
        if config.engine == "ray":
            from preprocess.cluster.engines import ray_engines

            elsewhere = held.enter_context(ray_engines(config))
        outcome = run_encode(config, Console(stderr=True), elsewhere)
    if outcome.index is not None:
        echo(contents(output, outcome.index))
        if line := preview(outcome.index):
            echo(line)
    if outcome.signum is not None:
        echo(
            f"interrupted, {count(outcome.left, 'sample')} to go. To continue, run the same command "
            "again.",
            err=True,
        )
        raise typer.Exit(SIGNAL_EXIT + outcome.signum)
    rejected = rejections(outcome.rejected, rejected_file(output, config.rank.number))
    if len(outcome.rejected) > max_bad:
        raise UserError(
            f"{rejected}\nThe other samples are encoded and can be trained on. Mend these and "
            f"run again, or accept them with --max-bad {len(outcome.rejected)}."
        )
    if outcome.rejected:
        echo(rejected, err=True)
    if outcome.replaced:
        echo(f"{count(outcome.replaced, 'sample')} replaced that an older frame rule misread")
    if outcome.removed:
        echo(
            f"{count(outcome.removed, 'sample')} removed that the dataset does not give any "
            f"more; to have the room back: wanprep compact --shards {quoted(output)}"
        )
    if outcome.validation:
        echo(f"{count(outcome.validation, 'validation prompt')} in the shards")
    elif outcome.written == 0 and outcome.removed == 0:
        echo("nothing to do: every usable sample of the dataset is in the shards")
    echo(f"next: wantrain distill --shards {quoted(output)}")


app.command(cls=SeedCommand, epilog=ENCODE_EXAMPLES)(with_seed_flags(encode))


@app.command(cls=Command, epilog=INDEX_EXAMPLES)
def index(
    shards: Annotated[Path, typer.Option(parser=shards_folder, metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = Path("shards"),
) -> None:
    """Rebuild manifest.json and index.zarr from the shards.

    For shards that were copied from somewhere else, or an index that is lost. Reads every tar once and checks it against its sidecar; so for captions and conditions that were added to them.

    Next: wantrain distill --shards DIR
    """
    from preprocess.cache.index import build_index, check_shards
    from preprocess.cache.remove import require_shards
    from preprocess.cache.report import contents
    from preprocess.cache.writer import output_lock, refusals_explained
    from shared.format.overlays import overlay_folders
    from shared.io.mirror import mirror_of

    require_shards(shards)
    for folder in (shards, *overlay_folders(shards)):
        with output_lock(folder), refusals_explained(folder, "The shards are as they were."):
            if mirror_of(folder) is None:  # a store checks what it keeps
                check_shards(folder)
            echo(contents(folder, build_index(folder)))


# fmt: on
plan.add_command(app, encode)
edit.add_commands(app)
overlays.add_commands(app)
inspect.add_commands(app)


def main() -> None:
    """The console script."""
    run(app)
