"""What wandistill wrote and said before its files were moved, to be made again and compared.

    python -m tests.golden.make FOLDER

runs a few commands as a user would type them and writes to a new FOLDER what they give: for three
families in fp32 and bf16 what is in a small cache, in the checkpoints of two updates and in the
LoRA's three forms, and the dry runs; all help pages; every option. Two trees behave alike if
`diff -r` finds nothing between their folders, made on one machine. `tests/golden/files` was made
by 763ed6a, before its modules were moved; `test_golden.py` compares, but for digests.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer
import zarr
from safetensors.torch import load
from typer.core import TyperGroup, TyperOption

from shared.cli.run_file import RUN_FILE
from tests.models import Mode, tiny_model
from train.page.run_page import PAGE
from train.tracking.metrics_file import METRICS

ROOT = Path(__file__).parents[2]
MEDIA = ROOT / "tests" / "old_caches" / "d0f92fe" / "media"
CLIPS = ("h264.mp4", "vp9.webm", "portrait.jpg", "photo.png")
FAMILIES: tuple[Mode, ...] = ("t2v", "i2v", "ti2v")
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
PROGRAMS = ("wanprep", "wantrain")
HEX = re.compile(r"\b[0-9a-f]{32,64}\b")
LONG_NUMBER = re.compile(r"-?\d+\.\d{6,}(e-?\d+)?")


def command(words: str, folder: Path) -> str:
    """Run a command of this tree in `folder`; its stdout, without what changes from run to run."""
    program, *rest = words.split()
    code = f"import sys; sys.argv[0] = {program!r}; import wandistill_cli as c; c.{program}()"
    ran = subprocess.run(
        [sys.executable, "-c", code, *rest],
        cwd=folder,
        # What the machine has learned, as how fast it encodes, must not be told.
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "WANDISTILL_CACHE": str(folder / ".cache")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{words}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def group_of(program: str) -> TyperGroup:
    import preprocess.cli.app
    import train.cli.app

    apps = {"wanprep": preprocess.cli.app.app, "wantrain": train.cli.app.app}
    group = typer.main.get_command(apps[program])
    assert isinstance(group, TyperGroup)
    return group


def options(program: str) -> dict[str, Any]:
    """Every option of every command, the hidden ones too: names, type, default, variable."""

    def facts(option: TyperOption) -> dict[str, Any]:
        annotation = option.type_descriptor.annotation
        return {
            # Without the module of a type of ours: types may move.
            "type": re.sub(r"\b(train|preprocess)\.[a-z_.]+\.", "", str(annotation)),
            "least": option.min,
            "most": option.max,
            "default": str(option.default),
            "shown default": option.show_default,
            "required": option.required,
            "variable": option.envvar,
            "hidden": option.hidden,
        }

    return {
        name: {
            " ".join([*option.opts, *option.secondary_opts]): facts(option)
            for option in command.params
            if isinstance(option, TyperOption)
        }
        for name, command in group_of(program).commands.items()
    }


def pages(folder: Path) -> None:
    """Help pages and options."""
    for program in PROGRAMS:
        for name in ("", *group_of(program).commands):
            page = command(f"{program} {name} --help", folder)
            (folder / f"{program}-{name or 'all'}.help.txt").write_text(page)
        listed = json.dumps(options(program), indent=1, sort_keys=True) + "\n"
        (folder / f"{program}.options.json").write_text(listed)


def family(mode: Mode, precision: str, output: Path) -> None:
    """Write what one family in one number format gives: cache, checkpoint, LoRAs and dry runs."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "media").mkdir()
        for name in CLIPS:
            shutil.copy(MEDIA / name, folder / "media")
            shutil.copy((MEDIA / name).with_suffix(".txt"), folder / "media")
        tiny_model(folder / "model", mode, two_experts=mode != "ti2v", seed=5)
        encode = (
            "--model model --train-data-dir media --size 64 --video-sample-n-frames 9 "
            f"--video-sample-stride 1 --dtype {precision} --vae-dtype {precision} "
            f"--text-encoder-dtype {precision} --num-workers 1 --device cpu --output shards"
        )
        distill = (
            f"wantrain distill --model model --shards shards --output-dir run --device cpu "
            f"--boundary-type {'full' if mode == 'ti2v' else 'low'} --rank 6 --network-alpha 4 "
            f"--mixed-precision {PRECISIONS[precision]} --train-batch-size 2 --max-train-steps 2 "
            "--gen-update-interval 1 --learning-rate 1e-3 --ema-decay 0.5 --ema-start 1 "
            "--checkpointing-steps 1 --dataloader-num-workers 0"
        )
        said = [command(f"wanprep plan {encode}", folder)]
        command(f"wanprep encode {encode}", folder)
        said.append(command(f"{distill} --dry-run", folder))
        command(distill, folder)
        (output / f"{mode}-{precision}.dry-run.txt").write_text("\n".join(said))
        shutil.rmtree(folder / "media")
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        listed = "\n".join(listing(folder))
        (output / f"{mode}-{precision}.files.txt").write_text(listed + "\n")


def listing(folder: Path) -> Iterator[str]:
    """`file | what | form | spread | digest` of everything in the files below a folder.

    Digests are bytes of this machine: another CPU rounds otherwise. The rest is the same anywhere.
    """
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        if file.suffix == ".txt" or "index.zarr/" in file.as_posix() or file.name == RUN_FILE:
            continue  # a run file has the paths of this machine
        for line in _inside(file.name, file.read_bytes()):
            yield f"{file.relative_to(folder)} | {line}"
    index = zarr.open_group(folder / "shards" / "index.zarr", mode="r")
    for name, column in sorted(index.arrays()):
        values = np.asarray(column[:])
        yield f"index.zarr | {name} | {values.dtype} {list(values.shape)} | - | {_digest(values)}"


def _inside(name: str, data: bytes) -> Iterator[str]:
    if ".tfevents." in name:
        return
    if name == PAGE:
        yield "a page | - | - | -"
        return
    if name == METRICS:  # with times and memory: what is there, not what it is
        for number, line in enumerate(data.decode().splitlines()):
            yield f"{number} | {' '.join(json.loads(line))} | - | -"
        return
    if name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                opened = tar.extractfile(member)
                assert opened is not None
                plain = HEX.sub("HEX", member.name)
                for line in _inside(plain, opened.read()):
                    yield f"{plain} {line}"
    elif name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        for field in sorted(metadata):
            yield from _json(field, metadata[field])
        for tensor_name, tensor in sorted(load(data).items()):
            values = tensor.float().numpy()
            form = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
            yield f"{tensor_name} | {form} | {values.std():.3g} | {_digest(values)}"
    elif name.endswith(".json"):
        yield from _json("", json.loads(data))
    elif name.endswith(".md"):
        yield "text | - | - | -"
    else:
        yield f"bytes | {len(data)} | - | {hashlib.sha256(data).hexdigest()[:16]}"


def _json(path: str, value: Any) -> Iterator[str]:
    """Fields of an object; of long numbers and digests only that they are there."""
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _json(f"{path}.{HEX.sub('HEX', key)}", value[key])
    else:
        text = json.dumps(value)
        plain = LONG_NUMBER.sub("NUMBER", HEX.sub("HEX", text))
        digest = "-" if plain == text else hashlib.sha256(text.encode()).hexdigest()[:16]
        yield f"{path} | {plain} | - | {digest}"


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    pages(folder)
    for mode in FAMILIES:
        for precision in PRECISIONS:
            family(mode, precision, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
