"""`wanprep doctor`: is this machine ready to encode, and are model and dataset whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from shared.cli import doctor as common
from shared.cli.doctor import Check, Finding, note, ok, wrong
from shared.io.object_store import local_path
from shared.models.spec import DEFAULT_MODEL

INPUT, OUTPUT = "Input", "Output"
MOST_PROBED = 200


# fmt: off
def doctor(
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that is to be looked at: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL,
    train_data_dir: Annotated[str | None, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder of videos and images (or WebDataset tars) to look at.", show_default="none", rich_help_panel=INPUT)] = None,
    train_data_meta: Annotated[str | None, typer.Option(metavar="FILE|URL", envvar="DATASET_META_NAME", help="Its list of media and captions.", show_default="the folder's", rich_help_panel=INPUT)] = None,
    output: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder that the shards would go to.", rich_help_panel=OUTPUT)] = "shards",
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.", show_default="off", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Check machine, model and dataset before encoding.

    Python, packages, torch, GPU and driver; decoders, which decode a clip made for it; optional packages and what they are for; disk space; the model's files, whether they are whole, their dtypes, names and shapes; the dataset's list, and its first 200 files, which are probed. Changes nothing and downloads nothing. The exit code is 1 if something is wrong; each finding comes with what mends it.

    Next: wanprep encode

    Examples:
        # this machine, and the default model if it is here
        wanprep doctor

        # with a model folder and a dataset
        wanprep doctor --model models/Wan2.2-I2V-A14B --train-data-dir my/clips

        # the bundled toy
        wanprep doctor --model toy
    """
    # fmt: on
    checks: list[Check] = [*common.machine_checks(), ("decoders", _decoders)]
    if (local := local_path(output)) is not None:
        checks.append(common.disk_check("--output", local))
    checks += [common.cache_check(), common.model_check(model, _needed)]
    if train_data_dir is not None or train_data_meta is not None:
        checks.append(("dataset", lambda: _dataset(train_data_dir or "datasets", train_data_meta)))
    common.report(common.examine(checks), as_json=json)


def _needed(two_experts: bool, clip: bool) -> tuple[str, ...]:
    return ("vae", "text_encoder", *(("image_encoder",) if clip else ()))


def _decoders() -> Iterator[Finding]:
    """PyAV and decord, by a clip that ffmpeg writes now."""
    from importlib import import_module

    yield ok("decoders", f"PyAV {import_module('av').__version__}")
    try:
        yield ok("decoders", f"decord {import_module('decord').__version__}")
    except ImportError:
        text = "decord is not installed: some AVI files are rejected without (none for ARM Linux)"
        yield note("decoders", text, "pip install decord")
    import tempfile

    import numpy as np

    from preprocess.media.decode import probe_file
    from shared.io.mp4 import write_mp4

    with tempfile.TemporaryDirectory() as name:
        clip = Path(name) / "clip.mp4"
        write_mp4(clip, np.zeros((5, 64, 96, 3), dtype=np.uint8), fps=8)
        probe, _ = probe_file(clip, "video", None)
    text = f"a clip of 5 frames was written by ffmpeg and read as {probe.frames}"
    yield (ok if probe.frames == 5 else wrong)("decoders", text)


def _dataset(folder: str, listed: str | None) -> Iterator[Finding]:
    """The list as a whole, and the first media."""
    from preprocess.dataset.left_out import account
    from preprocess.dataset.toml_config import read_dataset
    from preprocess.media.probing import probed
    from preprocess.media.worker_pool import WorkerPool, default_workers
    from shared.io.hashing import FileHasher

    dataset = read_dataset(None, folder, listed)
    for line in account(dataset.tallies, dataset.left_out):
        yield ok("dataset", " ".join(line.split()))
    if not dataset.entries:
        yield wrong("dataset", f"{dataset.origin}: nothing usable")
    for one in dataset.rejected:
        yield wrong("dataset", f"{one.source} would be rejected: {one.reason}")
    files = {entry.source: entry for entry in dataset.entries if entry.path is not None}
    first = list(files.values())[:MOST_PROBED]
    right = 0
    with WorkerPool(min(default_workers(), max(1, len(first))), timeout=120) as pool:
        items = ((one, one.path, one.type) for one in first if one.path is not None)
        for entry, found in probed(items, FileHasher(), pool):
            if isinstance(found, Exception):
                yield wrong("dataset", f"{entry.source} would be rejected: {found}")
            else:
                right += 1
    if first:
        text = f"{right} of the first {len(first)} files can be read ({len(files)} in all)"
        yield ok("dataset", text)
