"""What a media file holds, as data: nothing here opens a file."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from preprocess.frames.orientation import Orientation

Frame = npt.NDArray[np.uint8]
"""(H, W, 3), RGB, 0..255."""

MediaKind = Literal["video", "image"]
"""What a file is."""

Kind = Literal["video", "image", "auto", "text"]
"""What a file is to be read as; auto: a video if it moves, else an image; text: no file."""

ANIMATIONS = (".gif", ".webp", ".apng", ".png", ".avif")
"""Endings of formats that hold stills as well as animations."""


class MediaError(Exception):
    """A file that cannot be used. The text names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class KeyFrames:
    """Where decoding of a long video may begin, and what must come of it.

    Seeking is an optimisation: what is decoded after it counts only where it is what decoding from
    the start gave. Arrays are kept as bytes, so that this compares, hashes and travels.
    """

    first: int
    """Number of the first frame that has a digest."""
    digests: bytes
    """uint32 of each frame from `first` on, in order."""
    places: tuple[tuple[int, int], ...]
    """(frame number, pts in the stream's time base) of key frames, ascending."""
    orientation: Orientation
    """Of all frames: the video stream itself may have it only at the start of the file."""


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """One clip's part of `KeyFrames`."""

    frame: int
    """Number of the key frame at which decoding begins."""
    pts: int
    digests: tuple[int, ...]
    """Of the key frame, then of each of the clip's frames."""
    orientation: Orientation


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file holds, as players and viewers show it."""

    frames: int
    """That are shown: neither what a header says nor what an edit list hides."""
    height: int
    width: int
    """Upright, in square pixels."""
    fps: float | None
    """Frames a second, on average; None for an image."""
    times: bytes | None = None
    """float64 of each frame: seconds after the first. None where frame n is shown at n / `fps`."""
    old_reading: str | None = None
    """Why the first rule may have read other pictures here (`preprocess.frames.first_rule`)."""
    notes: tuple[str, ...] = ()
    """What the user should know of a file that is taken all the same."""
    key_frames: KeyFrames | None = None
    """Of a long video."""

    @property
    def type(self) -> MediaKind:
        return "image" if self.fps is None else "video"

    def seconds(self) -> npt.NDArray[np.float64] | None:
        """`times` as an array."""
        return None if self.times is None else np.frombuffer(self.times, np.float64)

    def shortcut(self, indices: tuple[int, ...]) -> Shortcut | None:
        """Where decoding of these frames (ascending) may begin; None: at the start."""
        found = self.key_frames
        if found is None or not indices or indices[0] < found.first:
            return None
        before = [place for place in found.places if place[0] <= indices[0]]
        if not before:
            return None
        frame, pts = before[-1]
        digests = np.frombuffer(found.digests, np.uint32)
        wanted = digests[np.asarray([frame, *indices]) - found.first]
        return Shortcut(
            frame=frame,
            pts=pts,
            digests=tuple(map(int, wanted)),
            orientation=found.orientation,
        )
