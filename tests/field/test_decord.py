"""The pairs in which decord reads by index: it gives the frames of sequential decoding, to the bit.

Sequential decoding is PyAV's here, not ours, which takes decord in these pairs.
"""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from preprocess.frames import decord_pairs
from preprocess.media.reader import probe
from tests.field.cells import Cell
from tests.field.clips import CELLS
from tests.field.compare_with_decord import by_pyav
from tests.field.rejected import REJECTED
from tests.field.settings import settings

pytest.importorskip("decord")  # there is no wheel for ARM

NAMES = {"HuffYUV": "huffyuv", "Ut Video": "utvideo"}
CODECS = sorted(NAMES)


def taken(path: Path) -> bool:
    """Whether decord is what reads a file."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        layout = (context.pix_fmt or "", context.width, context.height)
        return decord_pairs.reads(container.format.name, context.name, *layout)


def assert_same(path: Path) -> None:
    """By index, at several strides and from several starts, and the number of frames."""
    frames = by_pyav(path)
    assert probe(path, "video").frames == len(frames)
    count = len(frames)
    for indices in (range(0, count, 2), range(count // 3, count, 3), range(count - 1, count)):
        theirs = list(decord_pairs.frames(path, indices))
        assert len(theirs) == len(indices)
        for index, frame in zip(indices, theirs, strict=True):
            assert np.array_equal(frame, frames[index]), f"frame {index} of {indices}"


def test_these_are_the_pairs() -> None:
    assert {codec for _, codec in decord_pairs.PAIRS} == set(NAMES.values())
    assert {container for container, _ in decord_pairs.PAIRS} == {"avi"}


@pytest.mark.parametrize("codec", CODECS)
def test_every_setting_of_the_encoder(codec: str, tmp_path: Path) -> None:
    tried = 0
    for setting in settings(codec):
        path = setting.make(tmp_path, "avi")
        if path is not None and taken(path):
            assert_same(path)
            tried += 1
    assert tried >= 6


WHOLE = [
    cell
    for cell in CELLS
    if cell.container == "avi"
    and cell.codec in NAMES
    and cell.oddity != "cut off"  # its last frame is no frame
    and cell.name not in REJECTED
]


@pytest.mark.parametrize("cell", WHOLE, ids=lambda cell: cell.name)
def test_every_cell_of_the_matrix(cell: Cell, made: Callable[[Cell], Path]) -> None:
    path = made(cell)
    assert taken(path)
    assert_same(path)
