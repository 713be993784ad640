"""What the first frame rule read: decord by index, in square pixels. For comparison only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.field.picture import Pixels


def frame_count(path: Path) -> int | None:
    """The number of frames that decord counts in the packets; None: it cannot open the file."""
    import decord

    try:
        return len(_opened(path))
    except decord.DECORDError:
        return None


def frames_at(path: Path, indices: Sequence[int], size: tuple[int, int]) -> list[Pixels]:
    """Frames (H, W, 3), stretched to `size` (width, height) if they are stored in another."""
    video = _opened(path)
    found = []
    for index in indices:
        frame = video[index].asnumpy()
        if size != (frame.shape[1], frame.shape[0]):
            frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
        found.append(frame)
    return found


def _opened(path: Path) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(str(path), num_threads=1)
