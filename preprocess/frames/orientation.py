"""Which way up a picture is shown: the one place where a display matrix is read and applied."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NEARLY = 1e-3  # of a right angle's sine; matrices are 16.16 fixed point


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How stored pixels become shown ones: transposed first, then mirrored."""

    transposed: bool = False
    mirrored_x: bool = False
    """Left and right are swapped."""
    mirrored_y: bool = False
    """Top and bottom are swapped."""

    @property
    def turned_only(self) -> bool:
        """Whether it is a rotation: not the mirror image of one."""
        return (self.transposed + self.mirrored_x + self.mirrored_y) % 2 == 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) as shown."""
        return (height, width) if self.transposed else (width, height)

    def apply(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(H, W, 3) as shown, from (H, W, 3) as stored."""
        if self.transposed:
            frame = frame.swapaxes(0, 1)
        if self.mirrored_x:
            frame = frame[:, ::-1]
        if self.mirrored_y:
            frame = frame[::-1]
        return np.ascontiguousarray(frame)


UPRIGHT = Orientation()


def of_display_matrix(side_data: bytes) -> Orientation:
    """FFmpeg's AV_FRAME_DATA_DISPLAYMATRIX: nine int32, [a b u; c d v; x y w].

    A stored pixel (p, q) is shown at (a·p + c·q + x, b·p + d·q + y); only the directions count
    here. Raises ValueError for an angle that is no multiple of 90°.
    """
    matrix = np.frombuffer(side_data[:36], np.int32).reshape(3, 3).astype(np.float64)
    (a, b), (c, d) = matrix[:2, :2]
    if not matrix[:2, :2].any():  # says nothing; players ignore it
        return UPRIGHT
    straight, across = np.hypot(a, d), np.hypot(b, c)
    if straight > 0 and across <= _NEARLY * straight and a and d:
        return Orientation(mirrored_x=bool(a < 0), mirrored_y=bool(d < 0))
    if across > 0 and straight <= _NEARLY * across and b and c:
        return Orientation(transposed=True, mirrored_x=bool(c < 0), mirrored_y=bool(b < 0))
    degrees = -np.degrees(np.arctan2(b, a)) % 360  # counter-clockwise, as ffmpeg counts
    raise ValueError(
        f"the video is to be shown rotated by {degrees:.0f} degrees, expected a multiple of 90. "
        "Rotate its frames: ffmpeg -i IN OUT.mp4"
    )
