"""docs/inputs.md says what the matrix asserts."""

from tests.field.cells import PLAIN
from tests.field.clips import CELLS
from tests.field.rejected import REJECTED
from tests.field.table import PAGE, READ, REFUSED, table


def test_the_page_has_todays_table() -> None:
    assert table() in PAGE.read_text(), "write it: python -m tests.field.table"


def test_every_oddity_is_explained_once() -> None:
    read = {cell.oddity for cell in CELLS if cell.name not in REJECTED}
    assert set(READ) == read - {PLAIN}
    assert set(REFUSED) == {cell.oddity for cell in CELLS if cell.name in REJECTED}


def test_every_video_container_of_the_page_is_tried() -> None:
    endings = {cell.name.rpartition(".")[2] for cell in CELLS}
    line = PAGE.read_text().partition("Videos are ")[2].partition("; images")[0]
    assert {ending.strip(" .`\n") for ending in line.split(",")} <= endings
