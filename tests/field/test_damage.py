"""Damage in the middle of a file: a frame comes as it was, or not at all. Never another picture.

Only codecs that can tell: a frame of HEVC, VP8 or VP9 with other bytes is another frame to any
decoder.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from preprocess.media.reader import MediaError, probe, read_frames
from tests.field import boxes
from tests.field.cells import Cell
from tests.field.clips import CELLS
from tests.field.picture import UnreadableError, number_of

HIT = 30
KINDS = ("zeros", "noise")
NAMES = (
    "mp4-h-264-nothing-odd.mp4",
    "mkv-h-264-b-frames.mkv",
    "avi-mpeg-4-nothing-odd.avi",
    "mpeg-ts-mpeg-2-nothing-odd.mpg",
    "mov-prores-nothing-odd.mov",
    "webm-av1-nothing-odd.webm",
)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_other_picture_comes(name: str, how: str, tmp_path: Path) -> None:
    (cell,) = (cell for cell in CELLS if cell.name == name)
    path = _damaged(cell, how).make(tmp_path)
    try:
        seen = probe(path, "video")
    except MediaError:
        return
    refused = 0
    several = [range(0, seen.frames, 2), range(1, seen.frames, 2)]
    for indices in (*several, *([index] for index in range(HIT - 2, HIT + 10))):
        wrong, ended = _wrong(path, indices)
        assert not wrong
        refused += ended
    assert refused > 0  # so there was damage


def _damaged(cell: Cell, how: str) -> Cell:
    """With frames large enough that damage in one is not damage of its header."""
    return dataclasses.replace(
        cell, size=(384, 256), edits=(lambda path: boxes.damage_packet(path, HIT, how),)
    )


def _wrong(path: Path, indices: Sequence[int]) -> tuple[list[str], bool]:
    """What came in place of frames, and whether the rest was refused."""
    found = []
    try:
        for index, frame in zip(indices, read_frames(path, "video", indices), strict=False):
            try:
                if (number := number_of(frame)) != index:
                    found.append(f"{number} for {index}")
            except UnreadableError:
                found.append(f"no picture for {index}")
    except MediaError:
        return found, True
    return found, False
