"""Where a LoRA lies: a file, a folder of peft or diffusers, an index of several files; and what the
command line says of it."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shared.errors import UserError, first_line
from shared.io.hashing import FileHasher, digest_of
from shared.models.original_layout import read_json
from shared.models.weight_files import INDEX, PICKLED, indexed

PEFT_CONFIG = "adapter_config.json"
PEFT_NAME = "adapter_model"
_NAMES = (PEFT_NAME, "pytorch_lora_weights")  # of peft and of diffusers
_PART = re.compile(r"(.+)-\d{5}-of-(?!00001)(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class ScaledLora:
    """A LoRA of the command line and the strength at which it is taken."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path} x {self.strength:g}"

    @property
    def without_folder(self) -> "ScaledLora":
        """By its name alone, for what others may read."""
        return ScaledLora(path=Path(self.path.name), strength=self.strength)

    @classmethod
    def parse(cls, text: str, option: str) -> "ScaledLora":
        """ "FILE" or "FILE:0.8", as given for `option`. Raises UserError."""
        name, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(path=Path(text))
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength) or strength == 0:
            raise UserError(
                f"{option}: found {text!r}, expected FILE or FILE:X, where X is the strength, a "
                "number other than 0."
            )
        return cls(path=Path(name), strength=strength)

    @property
    def digest(self) -> str:
        """SHA-256 of its file, wherever that lies; of several, of theirs. Raises UserError."""
        files = lora_files(self.path)
        config = peft_config_of(files)
        try:
            parts = [FileHasher().sha256(file) for file in (*files, *([config] if config else []))]
        except OSError as error:
            raise UserError(f"LoRA: cannot read {self.path} ({error.strerror}).") from error
        return parts[0] if len(parts) == 1 else digest_of(parts)


def peft_config_of(files: list[Path]) -> Path | None:
    """The `adapter_config.json` beside a LoRA, where it can't be of another one in the folder."""
    config = files[0].parent / PEFT_CONFIG
    own = files[0].name.startswith(PEFT_NAME) or (
        sorted(files[0].parent.glob("*.safetensors")) == sorted(files)
    )
    return config if own and config.is_file() else None


def lora_files(path: Path) -> list[Path]:
    """The safetensors files of a LoRA that is given as a file, as a folder or as an index.

    Raises UserError where they are not there, pickled, or but a part of a LoRA.
    """
    file = _in_folder(path) if path.is_dir() else path
    if file.name.endswith(INDEX):
        files = indexed(file, "LoRA")
        _check_whole(file, files)
        return files
    if file.suffix in PICKLED:
        raise UserError(
            f"LoRA: {file} is pickled, and wandistill runs no code of a file. Expected a "
            ".safetensors file."
        )
    if (match := _PART.fullmatch(file.name)) is not None and file.is_file():
        raise UserError(
            f"LoRA: {file} is one of the {int(match[2])} files of a LoRA. Give their index, "
            f"{file.parent / match[1]}{INDEX}"
        )
    return [file]


def _check_whole(index: Path, files: list[Path]) -> None:
    """UserError unless the files hold what their index lists, each once: a model would miss it."""
    held: Counter[str] = Counter()
    for file in files:
        with opened(file) as tensors:
            held.update(tensors.keys())
    listed = read_json(index, "LoRA")["weight_map"].keys()
    if wrong := sorted({key for key, times in held.items() if times > 1} | (listed - held.keys())):
        found = f"{held[wrong[0]]} times" if held[wrong[0]] else "nowhere"
        raise UserError(
            f"LoRA: {index} lists {wrong[0]}, which is in its files {found}. They are not of one "
            "save: get the folder again."
        )


def _in_folder(folder: Path) -> Path:
    """The one file in it that is a LoRA, or the index of one. Raises UserError."""
    there = sorted(folder.glob("*.safetensors"))
    listed = sorted(folder.glob(f"*{INDEX}"))
    known = [folder / f"{name}.safetensors" for name in _NAMES]
    found = [file for file in known if file in there] + listed or there
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"LoRA: {folder} holds {len(found)} of them: {', '.join(f.name for f in found)}. Give "
            "the file of one."
        )
    if pickled := [file for file in sorted(folder.iterdir()) if file.suffix in PICKLED]:
        return pickled[0]
    raise UserError(
        f"LoRA: {folder} is a folder without a LoRA. Expected a .safetensors file, or a folder of "
        f"peft or diffusers ({', '.join(f'{name}.safetensors' for name in _NAMES)})."
    )


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Block with a safetensors file. UserError when it is no such file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        # What safetensors says of a lost file is "No such device".
        why = first_line(error) if file.is_file() else "there is no such file"
        raise UserError(
            f"LoRA: cannot read {file} as safetensors ({why}). Expected a file that "
            "`wantrain distill` wrote, such as output_dir_distill/lora-low-diffusers.safetensors."
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a LoRA's safetensors files. UserError when they are no such files."""
    found: dict[str, str] = {}
    for file in lora_files(path):
        with opened(file) as tensors:
            found |= tensors.metadata() or {}
    return found
