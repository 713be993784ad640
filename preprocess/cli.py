"""`wanprep`: the command line of stage one. Heavy imports wait until a command runs."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from shared.cli_support import default_device, new_app, run
from shared.errors import UserError
from shared.model_spec import DEFAULT_MODEL, DEFAULT_NEGATIVE_PROMPT

app = new_app("Encode videos and images with captions, once, into shards that `wantrain` reads.")

INPUT, SAMPLES, ENCODERS, OUTPUT = "Input", "What a sample is", "Encoders", "Output"
SIGNAL_EXIT = 128  # a process ended by signal n exits with 128 + n


class Precision(str, Enum):
    """How numbers are kept."""

    bf16 = "bf16"
    fp32 = "fp32"


@app.callback()
def wanprep() -> None:
    """Keeps `encode` a subcommand whatever other commands there are."""


@app.command()
def encode(
    model: Annotated[
        str,
        typer.Option(
            "--pretrained-model-name-or-path",
            "--model",
            envvar="MODEL_NAME",
            help="Folder in diffusers layout, hub id, 'toy' (t2v) or 'toy-i2v'. Its VAE, text "
            "encoder and tokenizer are used.",
            rich_help_panel=INPUT,
        ),
    ] = DEFAULT_MODEL,
    train_data_dir: Annotated[
        Path,
        typer.Option(
            envvar="DATASET_NAME",
            help="Folder of videos and images; relative paths in the metadata start here.",
            rich_help_panel=INPUT,
        ),
    ] = Path("datasets"),
    train_data_meta: Annotated[
        Path | None,
        typer.Option(
            envvar="DATASET_META_NAME",
            help="JSON list of {file_path, text, type}.",
            show_default="metadata.json in the data dir, else same-named .txt captions",
            rich_help_panel=INPUT,
        ),
    ] = None,
    size: Annotated[
        int,
        typer.Option(
            help="Sets both sample sizes: 320 is 240P, 480 320P, 640 480P, 960 720P.",
            rich_help_panel=SAMPLES,
        ),
    ] = 640,
    image_sample_size: Annotated[
        int | None,
        typer.Option(help="Bucket size of images.", show_default="--size", rich_help_panel=SAMPLES),
    ] = None,
    video_sample_size: Annotated[
        int | None,
        typer.Option(help="Bucket size of videos.", show_default="--size", rich_help_panel=SAMPLES),
    ] = None,
    video_sample_stride: Annotated[
        int, typer.Option(help="Take every n-th source frame.", rich_help_panel=SAMPLES)
    ] = 2,
    video_sample_n_frames: Annotated[
        int,
        typer.Option(
            help="Most frames of a clip, of the form 4n+1; a shorter video gives what it has.",
            rich_help_panel=SAMPLES,
        ),
    ] = 81,
    seed: Annotated[
        int,
        typer.Option(help="Decides where in a video a clip starts.", rich_help_panel=SAMPLES),
    ] = 42,
    negative_prompt: Annotated[
        str,
        typer.Option(
            help="Encoded into the prompt bank, for the teacher's guidance.",
            show_default="Wan's published one",
            rich_help_panel=ENCODERS,
        ),
    ] = DEFAULT_NEGATIVE_PROMPT,
    vae_dtype: Annotated[
        Precision, typer.Option(help="The VAE computes in this.", rich_help_panel=ENCODERS)
    ] = Precision.fp32,
    text_encoder_dtype: Annotated[
        Precision,
        typer.Option(help="The text encoder computes in this.", rich_help_panel=ENCODERS),
    ] = Precision.bf16,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1 ...",
            show_default="cuda if there is one, else cpu",
            rich_help_panel=ENCODERS,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the shards.", rich_help_panel=OUTPUT)
    ] = Path("shards"),
    dtype: Annotated[
        Precision, typer.Option(help="The shards store this.", rich_help_panel=OUTPUT)
    ] = Precision.bf16,
    shard_size_mb: Annotated[
        int,
        typer.Option(help="Close a shard at this many megabytes.", rich_help_panel=OUTPUT),
    ] = 256,
    max_bad: Annotated[
        int,
        typer.Option(
            help="Samples that may be rejected before the exit code is 1; the others are "
            "encoded all the same.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0,
) -> None:
    """Videos, images and captions -> latents and text embeddings in shards.

    Interrupted and run again, it continues; with nothing to do, it ends at once.
    """
    from preprocess.config import EncodeConfig

    config = EncodeConfig(
        model=model,
        data_dir=train_data_dir,
        metadata=train_data_meta,
        output=output,
        image_size=size if image_sample_size is None else image_sample_size,
        video_size=size if video_sample_size is None else video_sample_size,
        stride=video_sample_stride,
        frames=video_sample_n_frames,
        negative_prompt=negative_prompt,
        seed=seed,
        dtype=dtype.value,
        vae_dtype=vae_dtype.value,
        text_encoder_dtype=text_encoder_dtype.value,
        shard_size_mb=shard_size_mb,
        max_bad=max_bad,
        device=device or default_device(),
    )

    from rich.console import Console

    from preprocess import report
    from preprocess.encode import REJECTED
    from preprocess.encode import encode as run_encode

    outcome = run_encode(config, Console(stderr=True))
    if outcome.index is not None:
        typer.echo(report.contents(output, outcome.index))
    if outcome.signum is not None:
        typer.echo(
            f"interrupted, {report.count(outcome.left, 'sample')} to go. To continue, run the same command "
            "again.",
            err=True,
        )
        raise typer.Exit(SIGNAL_EXIT + outcome.signum)
    rejections = report.rejections(outcome.rejected, output / REJECTED)
    if len(outcome.rejected) > max_bad:
        raise UserError(
            f"{rejections}\nThe other samples are encoded and can be trained on. Mend these and "
            f"run again, or accept them with --max-bad {len(outcome.rejected)}."
        )
    if outcome.rejected:
        typer.echo(rejections, err=True)
    if outcome.written == 0:
        typer.echo("nothing to do: every usable sample of the dataset is in the shards")
    typer.echo(f"next: wantrain distill --shards {output}")


@app.command()
def index(
    shards: Annotated[Path, typer.Option(help="Folder of the shards.")] = Path("shards"),
) -> None:
    """Rebuild manifest.json and index.zarr from the shards."""
    from preprocess import report
    from preprocess.index import build_index, check_shards
    from preprocess.writer import output_lock
    from shared.cache import committed_shards

    if not shards.is_dir() or not committed_shards(shards):
        raise UserError(
            f"--shards: no shards in {shards}. Make some: wanprep encode --output {shards}"
        )
    with output_lock(shards):
        check_shards(shards)
        typer.echo(report.contents(shards, build_index(shards)))


def main() -> None:
    """The console script."""
    run(app)
