"""`wanprep doctor` and `wantrain doctor`: what both look at on a machine, and how they say it.

Made for machines where something is missing: every check is done by itself and imports what it
needs, and what it stumbles over becomes a finding of its name.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer

from shared.cli.support import echo, echo_data
from shared.errors import UserError, first_line
from shared.io.hashing import cache_folder
from shared.io.names import quoted

LEAST_FREE, LITTLE_FREE = 10**9, 20 * 10**9
"""Bytes on a disk: with fewer nothing can be done, with fewer a run may fill it."""
_WHEELS = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
# Extra → module, what it is for. Of pyproject.toml's, those that a user may want.
EXTRAS = {
    "s3": ("s3fs", "shards and media in S3"),
    "ray": ("ray", "--engine ray (wanprep encode, wantrain synthesize)"),
    "deepspeed": ("deepspeed", "--strategy zero2, zero3"),
    "quant": ("bitsandbytes", "--base-precision nf4"),
    "prodigy": ("prodigyopt", "--optimizer prodigy"),
    "evaluate": ("cv2", "wantrain evaluate (OpenCV)"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    verdict: Literal["ok", "note", "wrong"]
    """`note`: works as it is, but not everything does."""
    text: str
    cure: str | None = None
    """A command, where one mends it and the text does not have it."""


def ok(check: str, text: str) -> Finding:
    return Finding(check=check, verdict="ok", text=text)


def note(check: str, text: str, cure: str | None = None) -> Finding:
    return Finding(check=check, verdict="note", text=text, cure=cure)


def wrong(check: str, text: str, cure: str | None = None) -> Finding:
    return Finding(check=check, verdict="wrong", text=text, cure=cure)


Check = tuple[str, Callable[[], Iterable[Finding]]]
"""Its name, and what does it."""


def examine(checks: Sequence[Check]) -> Iterator[Finding]:
    """What all checks find, whatever they stumble over."""
    for name, check in checks:
        try:
            yield from check()
        except UserError as error:
            yield wrong(name, str(error))
        except (Exception, SystemExit) as error:  # of any library, or of one that is broken
            yield wrong(name, f"can't be checked: {first_line(error)}")


def report(findings: Iterable[Finding], *, as_json: bool) -> None:
    """Print them as they come. Exits with code 1 if something is wrong."""
    found = []
    for one in findings:
        found.append(one)
        if as_json:
            continue
        first, *more = one.text.splitlines() or [""]
        echo(f"{one.verdict:<6} {one.check:<9} {first}")
        for line in (*more, *([f"mend it: {one.cure}"] if one.cure else [])):
            echo(f"{'':<17}{line}")
    bad = sum(one.verdict == "wrong" for one in found)
    if as_json:
        echo_data(json.dumps({"wrong": bad, "findings": [asdict(one) for one in found]}, indent=1))
    else:
        echo(f"{bad or 'nothing'} wrong, {len(found)} checked")
    if bad:
        raise typer.Exit(1)


def machine_checks() -> list[Check]:
    """Python, packages, torch, GPU and driver."""
    return [("python", _python), ("packages", _packages), ("gpu", _gpu), ("extras", _extras)]


def _python() -> Iterator[Finding]:
    yield ok("python", f"{sys.version.split()[0]} in {sys.prefix}")  # older ones end at imports


def _packages() -> Iterator[Finding]:
    """Those that pyproject.toml asks for, and their versions."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("wandistill") or ()]
    except PackageNotFoundError:
        text = "wandistill itself is not installed here, so versions can't be compared"
        yield note("packages", text, "pip install -e .")
        return
    needed = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    right = 0
    for one in needed:
        cure = f"pip install {quoted(f'{one.name}{one.specifier}')}"
        try:
            found = version(one.name)
        except PackageNotFoundError:
            yield wrong("packages", f"{one.name} is not installed, expected {one.specifier}", cure)
            continue
        if one.specifier.contains(found, prereleases=True):
            right += 1
        else:
            yield wrong("packages", f"{one.name} is {found}, expected {one.specifier}", cure)
    yield ok("packages", f"{right} of {len(needed)} that are needed are there")


def _gpu() -> Iterator[Finding]:
    """torch, what it was built for, and the cards that it can use."""
    driver = _driver()
    for line in driver:
        yield ok("driver", line)
    import torch

    built = f"torch {torch.__version__}, " + (
        f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    )
    if not torch.cuda.is_available():
        if driver or Path("/proc/driver/nvidia/version").exists():
            why = "" if torch.version.cuda else ": this torch is for CPUs only"
            yield wrong("torch", f"{built}: there is a GPU, but torch can't use it{why}", _WHEELS)
            return
        yield ok("torch", built)
        yield note(
            "gpu", "no GPU: commands run on the CPU, which is enough for the toy models only"
        )
        return
    yield ok("torch", built)
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, whole = torch.cuda.mem_get_info(number)
        text = (
            f"cuda:{number} {facts.name}, {whole / 2**30:.1f} GiB ({free / 2**30:.1f} free), "
            f"compute capability {facts.major}.{facts.minor}"
        )
        if facts.major < 8:
            yield note("gpu", f"{text}; no bf16 in hardware: use --mixed-precision no")
        else:
            yield ok("gpu", text)
        torch.ones(8, device=f"cuda:{number}").sum().item()  # a kernel for this card is there


def _driver() -> list[str]:
    """A line for each card that the driver shows."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return [f"NVIDIA {line}" for line in ran.stdout.splitlines()] if ran.returncode == 0 else []


def _extras() -> Iterator[Finding]:
    """Optional packages and what they are for."""
    from shared.cli.left_out import ask_for

    for extra, (module, purpose) in EXTRAS.items():
        ask_for(module)
        text = f"{module}: {purpose}"
        if find_spec(module) is not None:
            yield ok("extras", text)
        else:
            yield note("extras", f"{text} (not installed)", f"pip install 'wandistill[{extra}]'")


def disk_check(option: str, folder: Path) -> Check:
    """Whether there is room in a folder, which need not be there yet, and it can be written to."""

    def check() -> Iterator[Finding]:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            yield wrong("disk", f"{option}: {there} is a file, expected a folder")
            return
        if not os.access(there, os.W_OK | os.X_OK):
            yield wrong("disk", f"{option}: {there} can't be written to", f"name another {option}")
            return
        free = shutil.disk_usage(there).free
        text = f"{option}: {folder} has {free / 1e9:.1f} GB free"
        if free < LEAST_FREE:
            yield wrong("disk", f"{text}, expected 1 or more")
        elif free < LITTLE_FREE:
            yield note("disk", f"{text}: little for shards or weights")
        else:
            yield ok("disk", text)

    return "disk", check


def cache_check() -> Check:
    """The same of what this machine remembers."""
    return disk_check("~/.cache", cache_folder())


def model_check(name: str, needed: Callable[[bool, bool], Sequence[str]]) -> Check:
    """The parts of a model folder: their files, whole or not, dtypes, names and shapes.

    `needed`: (two experts, CLIP) → components that this program's commands read.
    """

    def check() -> Iterator[Finding]:
        folder = model_folder(name)
        if folder is None:
            text = f"{name} is not on this machine; a command that needs it downloads it"
            yield note("model", text, f"hf download {quoted(name)}")
            return
        from shared.models.spec import read_model_spec

        spec = read_model_spec(folder)
        experts = "two experts" if spec.two_experts else "one transformer"
        yield ok("model", f"{folder}: {spec.mode}, {experts}")
        wanted = needed(spec.two_experts, spec.image_dim is not None)
        for component in dict.fromkeys((*spec.expert_folders, "vae", "text_encoder", *wanted)):
            try:
                yield _component(spec.family, folder, component, component in wanted)
            except UserError as error:
                yield wrong("model", str(error))

    return "model", check


def model_folder(name: str) -> Path | None:
    """Where a model lies; None where it would be downloaded. UserError where there is none."""
    from shared.models.spec import HUB_NAME_PARTS, resolve_model

    if Path(name).is_dir() or name.count("/") != HUB_NAME_PARTS - 1 or name[0] in "./~":
        return resolve_model(name, [])
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _component(family: object, folder: Path, component: str, wanted: bool) -> Finding:
    """What there is of one component. UserError where it is damaged or of another model."""
    from shared.models.weight_files import weight_files

    files = weight_files(folder, component)
    if not files:
        text = f"{component}: its weights are not in {folder}"
        if not wanted:
            return note("model", f"{text}, and not needed here")
        return wrong("model", text, "download the whole folder: hf download REPOSITORY")
    for file in files:
        _refuse_truncated(file)
    from shared.models.family import Family
    from shared.models.weights import check_component, model_weights

    assert isinstance(family, Family)
    check_component(family, folder, component)  # names and shapes
    stored = model_weights(folder, component).stored
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()})
    size = sum(file.stat().st_size for file in files)
    held = f"{len(files)} file(s), {size / 1e6:,.1f} MB, {len(stored)} tensors"
    return ok("model", f"{component}: {held}, {', '.join(dtypes)}")


def _refuse_truncated(file: Path) -> None:
    """UserError where a safetensors file ends before its last tensor; others are not looked at."""
    if file.suffix != ".safetensors":
        return
    size, cure = file.stat().st_size, f"Delete it and download it again: rm {quoted(file)}"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise UserError(f"model: {file} is cut short, within its header ({size} bytes). {cure}")
        try:
            header = json.loads(stream.read(length))
            ends = [one["data_offsets"][1] for k, one in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"model: {file} has no header of safetensors. {cure}") from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise UserError(f"model: {file} has {size} bytes, its header needs {whole}. {cure}")
