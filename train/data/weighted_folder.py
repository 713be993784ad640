"""Folders of shards and their weights, as `--shards` names them."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import typer

from shared.errors import UserError
from shared.io.names import exists
from shared.io.object_store import is_url, local_path

MOST_WEIGHT, FINEST_WEIGHT = 1000, 1000
_WEIGHTED = re.compile(r"(?P<folder>.+)@(?P<weight>[0-9.]+(?:/[0-9]+)?)", re.DOTALL)


@dataclass(frozen=True)
class WeightedFolder:
    """A folder of shards, and how often an epoch shows its samples: 1/2 is each second one."""

    path: Path | str
    """A URL is a text."""
    weight: Fraction = Fraction(1)

    @property
    def place(self) -> Path | str:
        """The path, the same for every way to write it."""
        path = self.path
        return path.resolve() if isinstance(path, Path) else path.rstrip("/")

    def __str__(self) -> str:
        plain = self.weight == 1 and not _WEIGHTED.fullmatch(str(self.path))
        return str(self.path) if plain else f"{self.path}@{self.weight}"


def weighted_folder(text: str) -> WeightedFolder:
    """`DIR`, `DIR@3`, `s3://bucket/shards@0.5` or `DIR@1/3`: the last @NUMBER is a weight.

    A folder that is there by that very name stands for itself, with the weight 1. Raises UserError
    for a weight that is none.
    """
    found = _WEIGHTED.fullmatch(text)
    if found is None or (not is_url(text) and exists(Path(text))):
        return WeightedFolder(local_path(text) or text)
    try:
        weight = Fraction(found["weight"])
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if not 0 < weight <= MOST_WEIGHT or weight.denominator > FINEST_WEIGHT:
        raise UserError(
            f"{text!r} ends in the weight {found['weight']!r}, expected a number "
            f"above 0 up to {MOST_WEIGHT} of at most three decimals, or a fraction such as 1/3. "
            f"A folder of that name is written with a weight behind it: {text}@1"
        )
    return WeightedFolder(local_path(found["folder"]) or found["folder"], weight)


DEFAULT_SHARDS = cast(list[WeightedFolder], (WeightedFolder(Path("shards")),))
"""Of an option that typer calls a list; a dataclass takes no list as default."""


def shards_option(text: str | WeightedFolder) -> WeightedFolder:
    """`weighted_folder` for the command line, which shows a ValueError's value alone."""
    if isinstance(text, WeightedFolder):
        return text
    try:
        return weighted_folder(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error
