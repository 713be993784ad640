"""`wanprep encode` on the command line."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from preprocess.encode.config import EncodeConfig, for_this_machine
from shared.cli.support import echo
from shared.errors import UserError
from shared.interrupt import SIGNAL_EXIT
from shared.io.mirror import open_store
from shared.io.names import quoted

if TYPE_CHECKING:
    from shared.cache.session import Outcome


def leave_if_interrupted(outcome: "Outcome", noun: str) -> None:
    """Say what is left of a run that a signal ended, and exit with its code."""
    from shared.cli.console import count

    if outcome.signum is not None:
        left = count(outcome.left, noun)
        echo(f"interrupted, {left} to go. To continue, run the same command again.", err=True)
        raise typer.Exit(SIGNAL_EXIT + outcome.signum)


def encode(config: EncodeConfig, _: typer.Context) -> None:
    r"""Encode, and say what the cache holds and what comes next.

    Examples:
        # datasets/ for Wan2.2-I2V-A14B: 480P, 81 frames, every second frame
        wanprep encode

        # the same at 720P, frames as they come, captions from a list
        wanprep encode --model Wan-AI/Wan2.2-I2V-A14B-Diffusers --size 960 \
            --train-data-dir my/clips --train-data-meta my/captions.csv \
            --video-sample-stride 1 --output shards-720p

        # the bundled toy model on rendered clips, seconds on a CPU
        python scripts/render_clips.py --count 4 --output toy-clips
        wanprep encode --model toy --train-data-dir toy-clips --size 64 \
            --video-sample-n-frames 17 --video-sample-stride 1 --output toy-shards
    """
    from rich.console import Console

    from preprocess.encode import run as encode_run
    from shared.cache.rejected import rejections
    from shared.cache.report import contents, preview
    from shared.cli.console import count

    config = for_this_machine(config)
    with ExitStack() as held:
        elsewhere = None
        if config.engine == "ray":
            from preprocess.cluster.engines import ray_engines

            elsewhere = held.enter_context(ray_engines(config))
        output = held.enter_context(open_store(config.output, writer=config.rank.number).pulled())
        outcome = encode_run.encode(config, output, Console(stderr=True), elsewhere)
    if outcome.index is not None:
        echo(contents(outcome.index))
        if (rgb := outcome.index.latent_rgb) is not None and rgb.r2 is not None:
            echo(f"preview  {preview(rgb)}")
    leave_if_interrupted(outcome, "sample")
    rejected = rejections(outcome.rejected, output, config.rank.number)
    if len(outcome.rejected) > config.max_bad:
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
    mode = " --train-mode flf2v" if config.train_mode == "flf2v" else ""  # else the model's own
    echo(f"next: wantrain distill --shards {quoted(output)}{mode}")
