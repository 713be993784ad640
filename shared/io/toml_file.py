"""TOML files as people save them, on Windows with a byte order mark."""

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """What the file says. Raises OSError, and ValueError where it is no TOML in UTF-8."""
    return tomllib.loads(path.read_text(encoding="utf-8-sig"))
