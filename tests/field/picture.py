"""Pictures that carry their number: a few large blocks, legible after any codec, size or rotation.

A picture is a grid of 6 by 4 blocks, dark or bright. The outer columns are a fixed mark that tells
the eight orientations apart, the inner upper half is the number in binary, the inner lower half its
complement: a picture that is half of one frame and half of another cannot be read as either.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

SIZE = (96, 64)
"""Width, height."""
NUMBERS = 256
DARK, BRIGHT = 40, 210
_TINT = 24
_ROWS, _COLUMNS = 4, 6
_MARK = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], bool)
"""(row, left or right column): no turn or mirror of it, with any number between, is it again."""
_TOLERANCE = 45
"""Grey levels that a block's mean may be off: lossy codecs, other matrices; far from the middle."""
_SPREAD = 120
"""Grey levels that the pixels within a block may differ by; woven of two fields it is 170."""

ORIENTATIONS = range(1, 9)
"""EXIF's numbers: 1 upright; 2 mirrored; 3 turned by 180°; 4 upside down; 5 to 8 lie on a side."""


class UnreadableError(ValueError):
    """Not a picture of ours, or one that is damaged or blended of two."""


class Seen(NamedTuple):
    """What a picture shows."""

    number: int
    orientation: int


def picture(number: int, size: tuple[int, int] = SIZE) -> Pixels:
    """(H, W, 3) uint8, upright, of `size` (width, height)."""
    blocks = _blocks(number)
    width, height = size
    rows = np.arange(height) * _ROWS // height
    columns = np.arange(width) * _COLUMNS // width
    grey = np.where(blocks[rows][:, columns], BRIGHT, DARK)
    # Waves of red against blue that leave the mean as it is, so that chroma is coded, too.
    across, down = np.arange(width) / width, np.arange(height)[:, None] / height
    wave = 6 * np.pi * across + 2 * np.pi * down + number
    tint = np.rint(_TINT * np.sin(wave)).astype(int)
    return np.stack([grey + tint, grey, grey - tint], axis=2).astype(np.uint8)


def turned(frame: npt.NDArray[np.generic], orientation: int) -> npt.NDArray[np.generic]:
    """The upright `frame` as a file with that EXIF orientation stores it."""
    mirrored = frame[:, ::-1]
    return {
        1: frame,
        2: mirrored,
        3: np.rot90(frame, 2),
        4: np.rot90(mirrored, 2),
        5: np.rot90(mirrored, 1),
        6: np.rot90(frame, 1),
        7: np.rot90(mirrored, -1),
        8: np.rot90(frame, -1),
    }[orientation]


def see(frame: Pixels) -> Seen:
    """The number and the orientation of a picture (H, W, 3). Raises UnreadableError."""
    grey = frame.astype(np.float64).mean(axis=2)
    for orientation in ORIENTATIONS:
        undone = {6: 8, 8: 6}.get(orientation, orientation)
        upright = turned(grey, undone).astype(np.float64)
        blocks = _read_blocks(upright)
        if blocks is None:
            continue
        bits = blocks[:2, 1:5].ravel()
        number = int(np.packbits(bits)[0])
        if (blocks == _blocks(number)).all():
            return Seen(number, orientation)
    raise UnreadableError("the picture's blocks are no number of ours in any orientation")


def number_of(frame: Pixels) -> int:
    """The number that an upright picture carries. Raises UnreadableError."""
    number, orientation = see(frame)
    if orientation != 1:
        raise UnreadableError(f"picture {number} is not upright, but of orientation {orientation}")
    return number


def error_of(frame: Pixels) -> float:
    """Grey levels by which an upright picture differs from the one that was made, on average.

    Lossy codecs stay below 5; a wrong range, channel order or matrix does not.
    """
    height, width, _ = frame.shape
    wanted = picture(number_of(frame), (width, height)).astype(int)
    return float(np.abs(frame - wanted).mean())


def orientation_of(frame: Pixels) -> int:
    """How a picture lies, 1 to 8; 1 is upright. Raises UnreadableError."""
    return see(frame).orientation


def _blocks(number: int) -> npt.NDArray[np.bool_]:
    """(4, 6): which blocks are bright."""
    if not 0 <= number < NUMBERS:
        raise ValueError(f"{number} is no number from 0 to {NUMBERS - 1}")
    bits = np.unpackbits(np.array([number], np.uint8)).astype(bool).reshape(2, 4)
    blocks = np.empty((_ROWS, _COLUMNS), bool)
    blocks[:, [0, 5]] = _MARK
    blocks[:2, 1:5] = bits
    blocks[2:, 1:5] = ~bits
    return blocks


def _read_blocks(grey: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_] | None:
    """Which blocks of an upright picture are bright; None where one is neither."""
    height, width = grey.shape
    blocks = np.empty((_ROWS, _COLUMNS), bool)
    for row in range(_ROWS):
        for column in range(_COLUMNS):
            # The middle half: what lies at the edge may be of the neighbour.
            top, left = (row + 0.25) * height / _ROWS, (column + 0.25) * width / _COLUMNS
            bottom, right = top + height / _ROWS / 2, left + width / _COLUMNS / 2
            part = grey[round(top) : round(bottom), round(left) : round(right)]
            mean = part.mean()
            if np.abs(mean - (DARK, BRIGHT)).min() > _TOLERANCE or np.ptp(part) > _SPREAD:
                return None
            blocks[row, column] = mean > (DARK + BRIGHT) / 2
    return blocks
