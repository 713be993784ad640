"""Every clip is made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.field.cells import Cell


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """The file of a cell of the matrix. Not to be written to."""
    folder = tmp_path_factory.mktemp("field")
    paths: dict[str, Path] = {}

    def path_of(cell: Cell) -> Path:
        if cell.name not in paths:
            paths[cell.name] = cell.make(folder)
        return paths[cell.name]

    return path_of
