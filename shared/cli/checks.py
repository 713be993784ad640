"""Checks of options, and the words in which they say what is expected."""

import tempfile
from pathlib import Path

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
