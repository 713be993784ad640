"""The commands of `wanprep` that look at a cache and change nothing: `inspect`, `verify`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from shared.cache.ranks import this_rank
from shared.cli.support import echo, echo_data
from shared.device import chosen_device
from shared.errors import UserError
from shared.io.mirror import open_store
from shared.models.spec import DEFAULT_MODEL

INPUT, DECODE, OUTPUT = "Input", "Decoding", "Output"


# fmt: off
def inspect(
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards",

    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page, one self-contained file: samples as images with their captions, and the tables as charts.", show_default="none", rich_help_panel=OUTPUT)] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Number of samples on the page, drawn across the buckets.", rich_help_panel=OUTPUT)] = 24,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides which samples are drawn.", rich_help_panel=OUTPUT)] = 42,
) -> None:
    """Show what is in a cache.

    Buckets, lengths, captions, bytes, settings, caption sets and conditions, and how good previews are: images on the page are made from latents by a linear map that was fitted while encoding, so no VAE is needed. Reads the index, which is quick for any number of samples; for the lengths of videos it reads at most 2000 of them.

    Next: wanprep verify --shards DIR

    Examples:
        # what is in shards/
        wanprep inspect

        # and a page with images, captions and charts
        wanprep inspect --html shards.html --samples 48

        # the shards of the bundled toy model
        wanprep inspect --shards toy-shards --html toy-shards.html
    """
    from rich.console import Console

    from preprocess.inspection.overview import overview
    from preprocess.inspection.terminal import print_overview, saved

    _refuse_folder("--html", html)
    console = Console()
    with open_store(shards, writer=this_rank().number).pulled() as store:
        found = overview(store, seed=seed)
        wide = console if console.is_terminal else Console(width=max(110, console.width))
        print_overview(found, wide)
        if html is not None:
            from preprocess.inspection.html import write_page

            with _saving("--html", html):
                number = write_page(html, found, samples=samples, seed=seed)
            echo(saved(html, number))


def verify(
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards",

    decode: Annotated[int, typer.Option(metavar="N", help="Draw N samples and decode them with the VAE.", rich_help_panel=DECODE)] = 0,
    sample: Annotated[list[str] | None, typer.Option("--sample", metavar="KEY", help="Decode this sample; may be given several times.", show_default="none", rich_help_panel=DECODE)] = None,
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="A model with the VAE that encoded the shards: a folder, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=DECODE)] = DEFAULT_MODEL,
    train_data_dir: Annotated[str, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder of the videos and images that were encoded, to compare with.", rich_help_panel=INPUT)] = "datasets",
    seed: Annotated[int, typer.Option(metavar="N", help="Decides which samples are drawn.", rich_help_panel=DECODE)] = 42,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=DECODE)] = "auto",
    decode_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Skip a source if no frame of it was decoded for this long.", rich_help_panel=DECODE)] = 120,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the decoded samples, an mp4 each (images: PNG).", rich_help_panel=OUTPUT)] = Path("decoded"),
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the findings to a file, as JSON; - is stdout.", show_default="none", rich_help_panel=OUTPUT)] = None,
) -> None:
    r"""Check every shard; list what is wrong, by file and sample.

    Reads everything once: checksums, members, shapes, NaN, empty text, the index against the tars; caption sets and conditions too. Samples of an older wandistill, which took wrong frames of some files, are checked against their media (in --train-data-dir). Changes nothing, and may run while another wanprep encodes. The exit code is 1 if something is wrong. Each finding comes with its meaning and its cure.

    Next: wantrain distill --shards DIR

    Examples:
        # read every shard in shards/ and list what is wrong
        wanprep verify

        # and five samples through the VAE, compared with their files
        wanprep verify --decode 5 --train-data-dir my/clips --output decoded

        # the shards of the bundled toy model
        wanprep verify --shards toy-shards --decode 2 --model toy \
            --train-data-dir toy-clips --output toy-decoded
    """
    from rich.console import Console

    from preprocess.media.remote import open_folder
    from preprocess.verify import misread, report
    from preprocess.verify.cache_check import verify as run_verify
    from preprocess.verify.decode_samples import DecodeConfig, decode_samples, findings

    _refuse_folder("--json", json)
    if (decode or sample) and output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file, expected a folder. Name another.")
    console = Console(stderr=True)
    with open_store(shards, writer=this_rank().number).pulled() as store:
        config = DecodeConfig(
            shards=store,
            model=model,
            data_dir=open_folder(train_data_dir),
            output=output,
            count=decode,
            keys=tuple(sample or ()),
            seed=seed,
            device=chosen_device(device),
            decode_timeout=decode_timeout,
        )
        verified = run_verify(store, console)
        verified.findings += misread.findings(
            store, config.data_dir, console, timeout=decode_timeout
        )
        quiet = json is not None and str(json) == "-"
        if not quiet:
            for line in report.lines(verified.findings):
                echo(line)
            echo(report.summary(verified))
        if decode or sample:
            done = decode_samples(config, console)
            also = findings(config, done)
            verified.findings += also
            if not quiet:
                for line in [*map(report.decoded, done), *report.lines(also)]:
                    echo(line)
        if json is not None:
            text = report.as_json(verified)
            if quiet:
                echo_data(text)
            else:
                with _saving("--json", json):
                    json.write_text(text + "\n")
        if verified.errors:
            raise UserError(report.failure(verified))


# fmt: on
def _refuse_folder(option: str, file: Path | None) -> None:
    """UserError, before a long read, if a folder is named instead of a file."""
    if file is not None and file.is_dir():
        raise UserError(f"{option}: {file} is a folder, expected a file. Name one in it.")


@contextmanager
def _saving(option: str, file: Path) -> Iterator[None]:
    """UserError where the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}: cannot write {file} ({error.strerror}). Choose another place."
        ) from error
