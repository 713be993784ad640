"""Which frames of a video a clip takes: every N-th that is shown, or the nearest in time. Pure."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from preprocess.frames.media_info import MediaError, Probe

_ROUNDING = 1e-9  # seconds: two frames are equally near, and the later one is taken


@dataclass(frozen=True, kw_only=True, eq=False)
class Picks:
    """Frames at a step from a start, in a source of `frames` frames."""

    frames: int
    step: float
    """Source frames from one frame of a clip to the next; where times are uneven, on average."""
    seconds: npt.NDArray[np.float64] | None = None
    """When each frame is shown, where times are uneven and count."""
    interval: float = 0.0
    """Seconds from one frame of a clip to the next, where `seconds` are given."""

    def at(self, number: int, start: int = 0) -> int:
        """The source frame that is frame `number` of a clip which begins at frame `start`.

        Never less than for the number before; the same again only where the source is slower.
        """
        if self.seconds is None:
            return start + math.floor(number * self.step + 0.5)
        return _nearest(self.seconds, self.seconds[start] + number * self.interval)

    def reachable(self) -> int:
        """How many frames a clip from the source's first frame can have."""
        if self.seconds is None:
            count = max(0, int(self.frames / self.step) + 2)
            while count and self.at(count - 1) >= self.frames:
                count -= 1
            return count
        return 1 + max(0, math.ceil(self._end(self.seconds) / self.interval) - 1)

    def starts(self, length: int) -> int:
        """From how many frames a clip of `length` frames, which are reachable, can begin."""
        if self.seconds is None:
            return self.frames - self.at(length - 1)
        latest = self._end(self.seconds) - (length - 1) * self.interval
        return max(1, int(np.searchsorted(self.seconds, latest)))

    def _end(self, seconds: npt.NDArray[np.float64]) -> float:
        """Until when the last frame is the nearest: half a frame of average length beyond it."""
        return float(seconds[-1]) * (1 + 0.5 / (self.frames - 1))


def picks_of(probe: Probe, *, stride: int, fps: float | None) -> Picks:
    """By `fps` frames a second where that is given, else every `stride`-th frame.

    Raises MediaError for a video without a frame rate where `fps` is given.
    """
    if fps is None:
        return Picks(frames=probe.frames, step=stride)
    if probe.fps is None or not 0 < probe.fps < math.inf:
        raise MediaError(f"the file has no frame rate ({probe.fps}), which --fps needs")
    return Picks(
        frames=probe.frames,
        step=probe.fps / fps,
        seconds=probe.seconds(),
        interval=1 / fps,
    )


def _nearest(seconds: npt.NDArray[np.float64], time: float) -> int:
    after = int(np.clip(np.searchsorted(seconds, time), 1, len(seconds) - 1))
    later_is_nearer = seconds[after] - time <= time - seconds[after - 1] + _ROUNDING
    return after if later_is_nearer else after - 1
