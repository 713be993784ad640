"""Matroska and WebM that end anywhere (a recorder that crashed) show what players show of them."""

from pathlib import Path

import pytest

from preprocess.media.reader import MediaError, probe, read_frames
from tests.field import ffmpeg
from tests.field.clips import CELLS
from tests.field.test_matrix import numbers

NAMES = (
    "mkv-h-264-b-frames.mkv",
    "mkv-hevc-nothing-odd.mkv",
    "mkv-h-264-longer-sound.mkv",
    "webm-vp9-no-duration.webm",
    "webm-av1-nothing-odd.webm",
)


@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere(name: str, tmp_path: Path) -> None:
    (cell,) = (cell for cell in CELLS if cell.name == name)
    data = cell.make(tmp_path).read_bytes()
    path = tmp_path / f"cut.{cell.container}"
    read = 0
    for tenth in range(1, 10):
        path.write_bytes(data[: len(data) * tenth // 10 + 1])
        try:
            seen = probe(path, "video")
        except MediaError as error:
            assert "the video has no frames" in str(error)
            assert not read  # as soon as a frame is whole, it is read
            continue
        read = seen.frames
        found = numbers(list(read_frames(path, "video", range(read))))
        shown = numbers(ffmpeg.decoded(path))
        assert found == shown[:read] and len(shown) - read in (0, 1)  # the last one may be damaged
        # With B-frames, a frame may have come without those that are stored behind it.
        whole = [number for number in cell.expected if number in found[-3:]]
        assert found == [*cell.expected[: read - 3], *whole] or read < 3
    assert read > 45
