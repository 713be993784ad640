"""The file of `wantrain calibrate`: each expert's guidance by noise level, and how it was measured.

JSON, a few kilobytes: {"version": 1, "experts": {"high": …, "low": …, "full": …}}. An entry is one
`Calibration`; fields that a later version adds are ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.format.strict_json import Fields, is_count, is_list, read_object, require
from shared.io.durable import write_bytes
from shared.io.names import quoted
from train.functional.guidance import Guidance, GuidanceTable
from train.options import Expert

VERSION = 1
MOST_BYTES = 1 << 20
OPTION = "--real-guidance-scale"


def _numbers(value: object) -> bool:
    return is_list(value, lambda one: type(one) in (int, float))


_FIELDS: Fields = {
    "sigmas": _numbers,
    "scales": _numbers,
    "spread": _numbers,
    "measured": _numbers,
    "model": str,
    "base": str,
    "clips": is_count,
    "measured_on": dict,
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """w*(σ) of one expert, as measured."""

    sigmas: tuple[float, ...]
    """Rising."""
    scales: tuple[float, ...]
    spread: tuple[float, ...]
    """Standard error over clips of each scale as measured."""
    measured: tuple[float, ...]
    """The scales as they came: where too uncertain (near σ = 0), those beside stand in for it."""
    model: str
    """As it was named."""
    base: str
    """Digest of the expert's transformer, with what is merged in."""
    clips: int
    measured_on: Mapping[str, Any]
    """The shards: their digest and what synthesised them; seed and shift."""

    @property
    def table(self) -> GuidanceTable:
        """ValueError where the numbers make none."""
        return GuidanceTable(sigmas=self.sigmas, scales=self.scales)


def read_guidance(path: Path, expert: Expert, *, base: str, model: str) -> Guidance:
    """The expert's table. UserError where the file lacks it, or has another transformer's.

    `base`: digest of the run's teacher; `model`: its name.
    """
    experts = read_calibrations(path, OPTION)
    measure = (
        f"wantrain calibrate --model {quoted(model)} --boundary-type {expert} --output "
        f"{quoted(path)} --shards DIR"
    )
    found = experts.get(expert)
    if found is None:
        raise UserError(
            f"{OPTION}: {path} has no table for --boundary-type {expert}, only for "
            f"{' and '.join(sorted(experts)) or 'nothing'}. Measure it: {measure}"
        )
    if found.base != base:
        raise UserError(
            f"{OPTION}: the table in {path} was measured on other weights ({found.model}, "
            f"{found.base[:12]}…) than this run's teacher ({base[:12]}…). Measure it for this one, "
            f"with the run's --transformer-path and --base-lora: {measure}"
        )
    return found.table


def read_calibrations(path: Path, option: str) -> dict[str, Calibration]:
    """Expert → what the file says of it. UserError naming `option` where it is no such file."""
    cure = "Expected the file of `wantrain calibrate`."
    content = read_object(path, option, most=MOST_BYTES, cure=cure)
    if content.get("version") != VERSION:
        raise UserError(
            f"{option}: {path} has version {content.get('version')!r:.20}, this wandistill reads "
            f"{VERSION}. {cure}"
        )
    try:
        require(content, {"experts": dict})
        return {expert: _calibration(entry) for expert, entry in content["experts"].items()}
    except ValueError as error:
        raise UserError(f"{option}: {path}: {error}. {cure}") from error


def _calibration(entry: Any) -> Calibration:
    """ValueError where it is none."""
    if not isinstance(entry, dict):
        raise ValueError(f"an expert is {entry!r:.40}")
    require(entry, _FIELDS)
    values = {name: entry[name] for name in _FIELDS}
    for name in ("sigmas", "scales", "spread", "measured"):
        values[name] = tuple(map(float, values[name]))
    found = Calibration(**values)
    _ = found.table
    return found


def write_calibration(path: Path, expert: Expert, found: Calibration) -> None:
    """Add an expert's entry to the file, or replace it; those of others stay as they are.

    UserError as of `read_calibrations`, and where it can't be written.
    """
    experts = read_calibrations(path, "--output") if path.exists() else {}
    experts[expert] = found
    content = {"version": VERSION, "experts": {n: asdict(experts[n]) for n in sorted(experts)}}
    try:
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output: can't write {path} ({error.strerror}).") from error
