"""Long videos, where decoding of a late clip begins at a key frame: the same frames come of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.media.reader import probe, read_frames
from tests.field.clips import CELLS
from tests.field.picture import NUMBERS, number_of

COUNT = 340
WINDOW = tuple(range(281, 320, 2))

# Those of the matrix in which a seek may land elsewhere than the header says.
NAMES = (
    "mp4-h-264-nothing-odd.mp4",
    "mp4-h-264-b-frames.mp4",
    "mp4-h-264-open-gop.mp4",
    "mp4-hevc-open-gop.mp4",
    "mp4-h-264-intra-refresh.mp4",
    "mp4-h-264-variable-frame-rate.mp4",
    "mp4-h-264-edit-list.mp4",
    "mp4-h-264-fragmented.mp4",
    "mkv-h-264-b-frames.mkv",
    "mkv-hevc-open-gop.mkv",
    "mkv-h-264-times-below-0.mkv",
    "mkv-h-264-wrong-frame-rate-in-the-header.mkv",
    "webm-vp9-hidden-frames.webm",
    "avi-h-264-b-frames.avi",
    "avi-xvid-packed-b-frames.avi",
    "avi-mpeg-4-variable-frame-rate.avi",
    "mpeg-ps-mpeg-2-b-frames.mpg",
    "mpeg-ts-h-264-open-gop.mpg",
    "mpeg-ts-h-264-times-that-wrap-around.mpg",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_late_in_a_long_video(name: str, tmp_path: Path) -> None:
    (cell,) = (cell for cell in CELLS if cell.name == name)
    hidden = cell.expected[0]  # by an edit list
    longer = replace(cell, numbers=[number % NUMBERS for number in range(COUNT)])
    path = longer.make(tmp_path)
    seen = probe(path, "video")
    assert seen.frames in (COUNT - hidden, COUNT - 2)  # libxvid keeps two to itself
    shortcut = seen.shortcut(WINDOW)
    decoded: list[None] = []
    frames = list(read_frames(path, "video", WINDOW, shortcut, lambda: decoded.append(None)))
    assert [number_of(frame) for frame in frames] == [
        (index + hidden) % NUMBERS for index in WINDOW
    ]
    if name == "mp4-h-264-nothing-odd.mp4":
        assert shortcut is not None
        assert len(decoded) < 2 * (WINDOW[-1] - WINDOW[0])  # so it is one
