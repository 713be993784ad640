"""`wantrain doctor`: is this machine ready to train, and are model and shards whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from shared.cli import doctor as common
from shared.cli.doctor import Check, Finding, ok, wrong
from shared.models.spec import DEFAULT_MODEL
from train.options import INPUT, OUTPUT


# fmt: off
def doctor(
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model that is to be looked at: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL,
    shards: Annotated[list[str] | None, typer.Option(metavar="DIR|URL", help="Folder of shards to look at; several, if given several times.", show_default="none", rich_help_panel=INPUT)] = None,
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder that checkpoints and LoRA files would go to.", rich_help_panel=OUTPUT)] = Path("output_dir_distill"),
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.", show_default="off", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Check machine, model and shards before training.

    Python, packages, torch, GPU and driver; optional packages and what they are for; disk space; the model's files, whether they are whole, their dtypes, names and shapes; of shards the index, the size of each file, and whether they were encoded for this model. Changes nothing and downloads nothing. The exit code is 1 if something is wrong; each finding comes with what mends it.

    Next: wantrain plan, wantrain distill

    Examples:
        # this machine, and the default model if it is here
        wantrain doctor

        # with a model folder and shards
        wantrain doctor --model models/Wan2.2-I2V-A14B --shards shards

        # the bundled toy
        wantrain doctor --model toy
    """
    # fmt: on
    checks: list[Check] = [
        *common.machine_checks(),
        common.disk_check("--output-dir", output_dir),
        common.cache_check(),
        common.model_check(model, _needed),
    ]
    for place in shards or ():
        checks.append(("shards", lambda place=place: _shards(place, model)))  # type: ignore[misc]
    common.report(common.examine(checks), as_json=json)


def _needed(two_experts: bool, clip: bool) -> tuple[str, ...]:
    return ("transformer", "transformer_2") if two_experts else ("transformer",)


def _shards(place: str, model: str) -> Iterator[Finding]:
    """Index and files of one folder, and whether a run on this model would take it."""
    from shared.format.cache import open_cache
    from shared.io.mirror import open_store
    from shared.io.names import quoted
    from shared.io.object_store import local_path

    with open_store(place).pulled() as store:
        index = open_cache(store)
        size = sum(index.shard_bytes)
        held = f"{len(index)} samples in {len(index.shards)} shards, {size / 1e6:,.1f} MB"
        yield ok("shards", f"{store}: {held}")
        if local_path(place) is not None:
            for name, expected in zip(index.shards, index.shard_bytes, strict=True):
                file = index.folder / name
                found = file.stat().st_size if file.is_file() else None
                if found != expected:
                    is_there = "is missing" if found is None else f"has {found} bytes"
                    cure = f"wanprep verify --shards {quoted(place)}"
                    yield wrong("shards", f"{file} {is_there}, expected {expected}", cure)
    from train.config import FinetuneConfig
    from train.data.weighted_folder import weighted_folder
    from train.run import open_data

    if common.model_folder(model) is not None:
        config = FinetuneConfig(model=model, shards=[weighted_folder(place)])
        spec, data = open_data(config, {})
        yield ok("shards", f"{data.folders} are for this model ({spec.mode})")
