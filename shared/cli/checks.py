"""Checks of options, and the words in which they say what is expected."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, get_args, get_type_hints

from shared.errors import UserError

WHOLE, ABOVE_0, FROM_0 = "a whole number from 1", "a number above 0", "0 or more"


def check_option(name: str, found: object, fine: bool, expected: str) -> None:
    """UserError naming the option unless its value is `fine`."""
    if not fine:
        raise UserError(f"--{name.replace('_', '-')}: found {found}, expected {expected}.")


def check_writable(option: str, folder: Path) -> None:
    """UserError unless files can be made in `folder` (made if need be)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option}: can't write to {folder} ({error.strerror}). Choose another folder."
        ) from error


@dataclass(frozen=True)
class Check:
    """What the value of an option must be; stands in its annotation. None is always fine."""

    fine: Callable[[Any], bool]
    expected: str


AT_LEAST_1 = Check(lambda n: n >= 1, WHOLE)
POSITIVE = Check(lambda x: 0 < x < inf, ABOVE_0)
NOT_NEGATIVE = Check(lambda x: 0 <= x < inf, FROM_0)
BELOW_1 = Check(lambda x: 0 <= x < 1, "a number in [0, 1)")
SHARE = Check(lambda x: 0 <= x <= 1, "a share in [0, 1]")
REMEMBERED = "a checkpoint remembers this option"
"""Stands in the annotations of options whose change between a checkpoint and its resumption is
reported."""


def check_options(config: Any) -> None:
    """UserError for the first field of a dataclass whose value its `Check` does not find fine."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for check in (one for one in get_args(hint)[1:] if isinstance(one, Check)):
            check_option(name, value, value is None or check.fine(value), check.expected)


def remembered(config: Any) -> dict[str, Any]:
    """Name → value of the options that a checkpoint remembers."""
    hints = get_type_hints(type(config), include_extras=True)
    return {n: getattr(config, n) for n, hint in hints.items() if REMEMBERED in get_args(hint)}
