"""A run's state on disk: safetensors and JSON, whole tensors under global names.

Everything that is saved is named in `TrainState`; what is not there is not saved. RNG and data
position follow from the counter. Nothing depends on how the model is wrapped or sharded.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from shared.errors import UserError
from shared.format.fingerprint import flatten
from shared.io.durable import building_folder, fsync_file, fsync_folder
from shared.io.hashing import digest_of
from shared.io.names import quoted
from train.optim.ema import Ema
from train.saving.safetensors_io import safetensors_parts
from train.strategies.base import TrainedRole

FORMAT_VERSION = 1
STATE = "state.json"
REPLACED_SUFFIX = ".replaced"
REMOVED_SUFFIX = ".removed"
Files = dict[str, Mapping[str, torch.Tensor]]
"""File of a checkpoint → its tensors by name."""

_UNNAMED = {"optimizer": "adamw", "holdout": 0.0}
"""What a run is that does not name it in its identity."""
_NAME = re.compile(r"checkpoint-(\d+)(?:\+(\d+))?")


def ema_file(role: str) -> str:
    """A checkpoint's file with the EMA of a role's weights."""
    return f"{role}_ema.safetensors"


@dataclass
class TrainState:
    """All of a run that changes while it runs."""

    trained: Mapping[str, TrainedRole]
    """By role."""
    updates: int = 0
    """Optimizer steps of all roles so far: the one counter."""
    ema: Ema | None = None
    """EMA of one role's weights, where the run keeps one; only in the first process."""
    record: dict[str, Any] = field(default_factory=dict)
    """JSON of `train.tracking.gauges`, the same in all processes."""

    def files(self) -> Files:
        """Everything to be saved, whole. All processes call it together."""
        files: Files = {}
        for role, trained in self.trained.items():
            files[f"{role}_weights.safetensors"] = trained.weights()
            files[f"{role}_optimizer.safetensors"] = trained.moments()
        if self.ema is not None:
            files[ema_file(self.ema.role)] = self.ema.weights
        return files

    def load(self, files: Files, updates: int, record: Mapping[str, Any] | None = None) -> None:
        """Put back what `files` gave. All processes call it together, with the same."""
        for role, trained in self.trained.items():
            trained.load(
                files[f"{role}_weights.safetensors"], files[f"{role}_optimizer.safetensors"]
            )
        if self.ema is not None:
            for name, average in self.ema.weights.items():
                average.copy_(files[ema_file(self.ema.role)][name])
        self.updates = updates
        self.record.clear()
        self.record.update(record or {})


@dataclass(frozen=True)
class Identity:
    """What a run is. `fixed` must match on resume; a change of `loose` is only reported."""

    fixed: dict[str, Any]
    loose: dict[str, Any]
    lora: dict[str, Any] = field(default_factory=dict)
    """The LoRA that the run saves: its `role`, and the `provenance` of its files."""


def checkpoint_name(steps: int, others: int) -> str:
    """checkpoint-N after N steps of the main role; "+k" where k of the other role followed."""
    return f"checkpoint-{steps}" + (f"+{others}" if others else "")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    found = (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=_number)


def _number(checkpoint: Path) -> tuple[int, int]:
    """By which checkpoints are ordered; of a name that is none the last."""
    match = _NAME.fullmatch(checkpoint.name)
    return (int(match[1]), int(match[2] or 0)) if match else (sys.maxsize, 0)


def save_checkpoint(
    folder: Path,
    files: Files,
    updates: int,
    identity: Identity,
    *,
    steps: int,
    others: int,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write DIR/checkpoint-N, which appears whole or not at all. Returns its path.

    `steps` and `others`: what the `updates` are, as its name says them.
    """
    final = folder / checkpoint_name(steps, others)
    with building_folder(final) as building:
        digests = {}
        for name, held in files.items():
            digest = hashlib.sha256()
            with (building / name).open("wb") as stream:
                for part in safetensors_parts({k: v.detach().cpu() for k, v in held.items()}):
                    digest.update(part)
                    stream.write(part)
            fsync_file(building / name)
            digests[name] = digest.hexdigest()
        content = {
            "format": FORMAT_VERSION,
            "updates": updates,
            "identity": identity.fixed,
            "settings": identity.loose,
            "product": {**identity.lora, "updates": steps},
            **({"record": record} if record else {}),
            "sha256": digests,
        }
        content["digest"] = digest_of(content)
        (building / STATE).write_text(json.dumps(content, indent=2) + "\n")
        fsync_file(building / STATE)
        fsync_folder(building)
    put_in_place(building, final)
    return final


def put_in_place(building: Path, final: Path) -> None:
    """Give a folder its name, also where an old one has it.

    It can't replace that in one rename; the old one is out of the way only for the time between two
    of them, and never deleted before the new one is in place.
    """
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    building.rename(final)
    fsync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_oldest(folder: Path, keep: int) -> None:
    """Delete all checkpoints of `folder` but the `keep` newest."""
    for path in list_checkpoints(folder)[:-keep]:
        # Under a name that is none first: half a checkpoint must not be found.
        path.rename(path.with_name(path.name + REMOVED_SUFFIX))
    for doomed in folder.glob(f"checkpoint-*{REMOVED_SUFFIX}"):
        if _NAME.fullmatch(doomed.name.removesuffix(REMOVED_SUFFIX)):  # no folder of the user's
            shutil.rmtree(doomed)


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are not what was written."""


def find_checkpoint(
    output_dir: Path, wanted: str | None, on_damaged: Callable[[str], None] = lambda _: None
) -> Path | None:
    """The checkpoint that `--resume-from-checkpoint` means: a path, a name, or "latest".

    "latest" is the newest that is whole; `on_damaged` hears of those that are not. None where it
    finds no checkpoint (a first start) or nothing is wanted. UserError when a path has none, when
    all are damaged, or when a run would be started over the checkpoints of an earlier one.
    """
    _restore_replaced(output_dir)
    existing = list_checkpoints(output_dir)
    if wanted is None:
        if existing:
            raise UserError(
                f"--output-dir: {output_dir} already holds {existing[-1].name} of an earlier run. "
                "Resume it: --resume-from-checkpoint latest; or choose another --output-dir."
            )
        return None
    if wanted == "latest":
        for path in reversed(existing):
            try:
                _check(path)
            except DamagedCheckpointError as error:
                if path == existing[0]:
                    raise
                on_damaged(str(error).split(". ")[0])
            else:
                return path
        return None
    for path in (Path(wanted), output_dir / wanted):
        if (path / STATE).exists():
            return path
    names = ", ".join(path.name for path in existing) or "none"
    raise UserError(
        f"--resume-from-checkpoint: {wanted} is not a checkpoint (no {STATE} in it). "
        f"In {output_dir} there are: {names}."
    )


def _check(path: Path) -> None:
    """Raise DamagedCheckpointError unless every file of a checkpoint is as it was written."""
    for name, digest in _read_state(path)["sha256"].items():
        _read_bytes(path / name, digest)


def _restore_replaced(folder: Path) -> None:
    """Undo half a replacement: killed between two renames, the old one only lost its name."""
    for path in folder.glob(f"checkpoint-*{REPLACED_SUFFIX}"):
        final = path.with_name(path.name.removesuffix(REPLACED_SUFFIX))
        if not final.exists():
            path.rename(final)


def set_later_aside(checkpoint: Path, output_dir: Path) -> list[Path]:
    """Rename the checkpoints that an earlier run made after `checkpoint`; their new paths.

    A run that resumes from `checkpoint` makes its own; if the old ones stayed, "latest" could mean
    the abandoned branch. Also those of `output_dir` where `checkpoint` lies in a folder of it, as
    the best one does.
    """
    inside = checkpoint.resolve().is_relative_to(output_dir.resolve())
    siblings = list_checkpoints(output_dir if inside else checkpoint.parent)
    later = [path for path in siblings if _number(path) > _number(checkpoint)]
    aside = []
    for path in later:
        aside.append(path.with_name(path.name + ".aside"))
        shutil.rmtree(aside[-1], ignore_errors=True)
        path.rename(aside[-1])
    return aside


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    files: Files
    updates: int
    changes: list[str]
    """What differs in the loose settings, in words."""
    record: dict[str, Any]
    """`TrainState.record`; empty of an earlier wandistill's."""


def load_checkpoint(path: Path, expected: Files, identity: Identity) -> Loaded:
    """Read a checkpoint whose weights must have the names and shapes of `expected`.

    Raises UserError when it is damaged or belongs to another model, adapter shape or recipe.
    """
    content = check_identity(path, identity)
    loaded: Files = {
        name: _read_tensors(path / name, sha) for name, sha in content["sha256"].items()
    }
    for file, held in expected.items():
        saved = loaded.get(file)
        if saved is None:
            raise _damaged(path, f"{file} is missing")
        for name, tensor in held.items():
            if name not in saved or saved[name].shape != tensor.shape:
                raise _damaged(path, f"{file} lacks {name} in its shape")
    changes = [
        f"{name}: {before!r} → {now!r}"
        for name, before, now in _differing(content["settings"], identity.loose)
    ]
    return Loaded(loaded, content["updates"], changes, content.get("record", {}))


def check_identity(path: Path, identity: Identity) -> dict[str, Any]:
    """Its state as JSON. UserError where a checkpoint is damaged, or of another model, adapter
    shape or recipe."""
    content = _read_state(path)
    there, here = (_UNNAMED | one for one in (content["identity"], identity.fixed))
    _refuse_other_identity(path, there, here)
    return content


def read_lora_of_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The LoRA that a checkpoint's run saves: weights by global names, and `Identity.lora`.

    The EMA where the run keeps one, as in the run's own LoRA files. UserError when there is no
    checkpoint, or a damaged one.
    """
    if not (path / STATE).is_file():
        raise UserError(
            f"--checkpoint: {path} is not a checkpoint (no {STATE} in it). Expected a folder such "
            "as output_dir_distill/checkpoint-50."
        )
    content = _read_state(path)
    lora = content.get("product", {})
    if "role" not in lora:
        raise UserError(
            f"--checkpoint: {path} has no metadata of its LoRA; an earlier wandistill "
            "wrote it. Resume its run (--resume-from-checkpoint) to get the LoRA files."
        )
    ema = ema_file(lora["role"])
    file = ema if ema in content["sha256"] else f"{lora['role']}_weights.safetensors"
    return _read_tensors(path / file, content["sha256"][file]), lora


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / STATE).read_text())
        version = content["format"]
        complete = {"updates", "identity", "settings", "sha256"} <= content.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{STATE} cannot be read ({error})") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint: {path} has format version {version}, this wandistill reads "
            f"{FORMAT_VERSION}."
        )
    digest = content.pop("digest", None)
    if not complete or digest != digest_of(content):
        raise _damaged(path, f"{STATE} is not what was written")
    return content


def _refuse_other_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    # Through JSON, so that a tuple and the list it became compare equal.
    differing = [
        f"  {name}: checkpoint has {there!r}, this run {here!r}\n"
        for name, there, here in _differing(found, json.loads(json.dumps(expected)))
    ]
    if differing:
        raise UserError(
            f"checkpoint: {path} belongs to another run:\n{''.join(differing)}"
            "Resume with the same settings, or start a new run with another --output-dir."
        )


def _differing(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    """(name, value in one, value in the other) of each setting in which they differ."""
    flat_one, flat_other = flatten(one), flatten(other)
    for name in sorted(flat_one.keys() | flat_other.keys()):
        if (there := flat_one.get(name)) != (here := flat_other.get(name)):
            yield name, there, here


def _read_tensors(file: Path, sha256: str) -> dict[str, torch.Tensor]:
    return load(_read_bytes(file, sha256))


def _read_bytes(file: Path, sha256: str) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _damaged(file.parent, f"{file.name} cannot be read ({error.strerror})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise _damaged(
            file.parent, f"{file.name} has SHA-256 {found[:12]}…, expected {sha256[:12]}…"
        )
    return data


def _damaged(path: Path, why: str) -> DamagedCheckpointError:
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    cure = (
        f"Resume from an earlier one: --resume-from-checkpoint {quoted(others[-1])}"
        if others
        else "There is no other checkpoint there; start a new run with another --output-dir."
    )
    return DamagedCheckpointError(f"checkpoint: {path} is damaged: {why}. {cure}")
