"""Container by codec by oddity: the frames that are read are those that a player shows.

The truth is the number in the picture, twice: what the clip was made of, and what the ffmpeg
program shows when it decodes from the start to the end.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from preprocess.media.reader import MediaError, probe, read_frames
from tests.field import ffmpeg
from tests.field.cells import Cell
from tests.field.clips import CELLS
from tests.field.picture import Pixels, UnreadableError, error_of, number_of
from tests.field.rejected import REJECTED

READ = [cell for cell in CELLS if cell.name not in REJECTED]
REFUSED = [cell for cell in CELLS if cell.name in REJECTED]


def named(cell: Cell) -> str:
    return cell.name


def numbers(frames: list[Pixels]) -> list[int | str]:
    """What an assertion shows best: the numbers, and why one is none."""
    found: list[int | str] = []
    for frame in frames:
        try:
            found.append(number_of(frame))
        except UnreadableError as error:
            found.append(str(error))
    return found


def test_no_two_cells_are_one() -> None:
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("cell", READ, ids=named)
def test_the_frames_read_are_those_shown(cell: Cell, made: Callable[[Cell], Path]) -> None:
    path = made(cell)
    whole = len(cell.expected)
    if cell.program_reads:
        shown = numbers(ffmpeg.decoded(path))
        assert shown[:whole] == cell.expected
        assert len(shown) - whole in (0, cell.damaged_last)

    seen = probe(path, cell.kind)
    assert seen.frames - whole in (0, cell.damaged_last)
    assert (seen.width, seen.height) == cell.expected_size
    assert seen.fps == (cell.fps and pytest.approx(cell.fps, rel=0.05))
    middle = range(whole // 3, 2 * whole // 3 + 1)
    for indices in (range(0, whole, 2), middle):
        frames = list(read_frames(path, seen.type, indices))
        assert numbers(frames) == [cell.expected[index] for index in indices]
        assert max(map(error_of, frames)) < (12 if cell.grey else 5)
        if not cell.sizes_vary:
            assert {frame.shape for frame in frames} == {(seen.height, seen.width, 3)}


@pytest.mark.parametrize("cell", REFUSED, ids=named)
def test_what_cannot_be_read_is_refused_with_the_reason(
    cell: Cell, made: Callable[[Cell], Path]
) -> None:
    path = made(cell)
    with pytest.raises(MediaError, match=REJECTED[cell.name]) as refused:
        probe(path, cell.kind)
    assert str(path) in str(refused.value)


def test_no_more_is_refused_than_is_listed() -> None:
    assert len(REFUSED) == len(REJECTED) == 16  # each one is a loss: none may join unnoticed
