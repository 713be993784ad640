"""Where `misread` says that the first frame rule read what is shown, it did, to the bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preprocess.media.reader import probe, read_frames
from tests.field import decord_frames
from tests.field.cells import Cell
from tests.field.clips import CELLS
from tests.field.rejected import REJECTED
from tests.field.settings import PAIRS, settings

pytest.importorskip("decord")  # there is no wheel for ARM

VIDEOS = [cell for cell in CELLS if cell.name not in REJECTED and cell.kind == "video"]
CONTAINERS = ("mp4", "mov", "mkv", "webm")
CODECS = ("H.264", "HEVC", "VP8", "VP9", "MJPEG", "ProRes")
"""What may pass at all."""


def differs(path: Path) -> str | None:
    """What decord reads otherwise; None: nothing, or `misread` says that it may."""
    seen = probe(path, "video")
    if seen.old_reading is not None:
        return None
    count = decord_frames.frame_count(path)
    if count is None:
        return None  # it was rejected: no cache has samples of it
    if count != seen.frames:
        return "count"
    size = seen.width, seen.height
    thirds = range(seen.frames // 3, seen.frames, 3)
    for indices in (range(0, seen.frames, 2), thirds):
        ours = read_frames(path, "video", indices)
        theirs = decord_frames.frames_at(path, indices, size)
        for index, one, other in zip(indices, ours, theirs, strict=True):
            if not np.array_equal(one, other):
                return f"frame {index} of {indices}"
    return None


@pytest.mark.parametrize("cell", VIDEOS, ids=lambda cell: cell.name)
def test_what_passes_was_read_as_it_is_shown(cell: Cell, made: Callable[[Cell], Path]) -> None:
    assert differs(made(cell)) is None


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("codec", CODECS)
def test_ordinary_clips_pass(container: str, codec: str, made: Callable[[Cell], Path]) -> None:
    """So that ordinary caches are not encoded again."""
    cells = [
        cell for cell in VIDEOS
        if (cell.container, cell.codec, cell.oddity) == (container, codec, "nothing odd")
    ]  # fmt: skip
    for cell in cells:
        assert probe(made(cell), "video").old_reading is None


@pytest.mark.long
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("codec", CODECS)
def test_with_many_settings_of_the_encoder(container: str, codec: str, tmp_path: Path) -> None:
    if codec not in PAIRS[container]:
        pytest.skip("not a pair of the matrix")
    wrong = {}
    passed = 0
    for setting in settings(codec):
        path = setting.make(tmp_path, container)
        if path is None:  # an encoder that wants larger pictures
            continue
        wrong[setting.name] = differs(path)
        passed += probe(path, "video").old_reading is None
    assert not {name: what for name, what in wrong.items() if what}
    assert passed >= 4
