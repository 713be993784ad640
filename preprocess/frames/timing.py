"""When each frame of a video is shown: its rate, and its times where they are not even. Pure.

Headers are not believed: a rate from one counts only where the frames' own times agree with it.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

_COARSE = 0.001  # seconds: Matroska rounds times to it
_JOINED_EVERY = 16  # frames: times that go back more often than so are out of order, not begun anew


def rate_and_times(
    pts: Sequence[int | None],
    dts: Iterable[int],
    tick: Fraction,
    claimed: Iterable[Fraction | None],
) -> tuple[float | None, Times | None]:
    """(frames a second, seconds of each frame after the first), the latter None where even.

    `pts` of the frames in the order in which they are shown, `dts` of their packets in any order,
    both in units of `tick` seconds; `claimed`: rates that headers name, the likeliest first. The
    rate is None where neither times nor headers tell one.
    """
    rates = [float(rate) for rate in claimed if rate is not None and 0 < rate < math.inf]
    ticks = _shown_at(pts, sorted(set(dts)))
    if len(pts) < 2 or ticks is None:
        return (rates[0] if rates else None), None
    seconds = (ticks - ticks[0]) * float(tick)
    average = (len(pts) - 1) / float(seconds[-1])
    even = np.arange(len(pts))
    tolerance = max(0.51 * float(tick), 1.01 * _COARSE)
    for rate in (*rates, average):
        if np.abs(seconds - even / rate).max() <= tolerance:
            return rate, None
    return average, seconds


def _shown_at(pts: Sequence[int | None], dts: Sequence[int]) -> Times | None:
    """A time for each frame, strictly ascending, in ticks; None where there are none to go by.

    Output order is the truth. Times of presentation that contradict it go on one step later where
    they begin anew (recordings that were joined); else they give way to the packets' own, if each
    has one (H.264 in AVI), or are taken in ascending order (Matroska with times below zero). Where
    some are missing, they follow from the others.
    """
    places = [number for number, time in enumerate(pts) if time is not None]
    known = [float(time) for time in pts if time is not None]
    steps = np.diff(known)
    backward = int((steps <= 0).sum())
    if 0 < backward <= len(known) // _JOINED_EVERY:
        steps[steps <= 0] = np.median(steps[steps > 0])
        known = [known[0], *(known[0] + np.cumsum(steps)).tolist()]
        backward = 0
    ascending = backward == 0
    if len(known) >= 2 and (ascending or (len(dts) < len(pts) and len(set(known)) == len(known))):
        return _filled(np.asarray(places), np.asarray(sorted(known)), len(pts))
    if len(dts) < 2:
        return None
    # As many as frames but for packets that hold two or none.
    ordinals = np.linspace(0, len(dts) - 1, len(pts))
    return np.interp(ordinals, np.arange(len(dts)), np.asarray(dts, np.float64))


def _filled(places: npt.NDArray[np.int64], times: Times, count: int) -> Times:
    """A time for each of `count` frames, of which those at `places` have these."""
    step = float(np.median(np.diff(times) / np.diff(places)))
    ticks = np.interp(np.arange(count), places, times)
    first, last = int(places[0]), int(places[-1])
    ticks[:first] = times[0] - step * np.arange(first, 0, -1)
    ticks[last + 1 :] = times[-1] + step * np.arange(1, count - last)
    return ticks
