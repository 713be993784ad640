"""Image files: stills and animations as viewers show them.

Upright, on white, every frame of an animation composed. Size and pixels come from `stills.shown`
alone, so they cannot disagree about which way is up.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.frames.hdr import refusal_of_image
from preprocess.frames.media_info import Frame, MediaError, Probe
from shared.io import stills

# The formats of `media_info.ANIMATIONS`. PIL reads them when they move, too: FFmpeg does not
# compose a GIF's frames on white.
_ANIMATION = re.compile(rb"GIF8|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|.{4}ftypavi[fs]", re.DOTALL)
_ORIENTATION = 0x0112  # of EXIF; PIL looks for it in XMP, too
_BROWSER_DELAY_MS = 100  # what browsers show where a frame's delay is missing or too short
_SHORTEST_DELAY_MS = 11

TRANSPARENT = "transparent in part, taken on white"


def is_animation(path: Path) -> bool:
    """Whether a file is of a format that may move, by its first bytes: it may have no name."""
    with path.open("rb") as stream:
        return _ANIMATION.match(stream.read(12)) is not None


def moves(path: Path) -> bool:
    """Whether an image file has several frames to show."""
    with _opened(path) as image:
        return len(_numbers(image)) > 1


def probe_still(path: Path) -> Probe:
    """The first frame of an image file. Raises MediaError, and what PIL raises."""
    with _opened(path) as image:
        shown = stills.shown(image)
        notes = (TRANSPARENT,) if stills.is_transparent(image) else ()
        return Probe(frames=1, height=shown.height, width=shown.width, fps=None, notes=notes)


def probe_animation(path: Path) -> Probe:
    """An animation: frames, and how long each is shown, with browsers' rule for short delays."""
    with _opened(path) as image:
        numbers = _numbers(image)
        delays = []
        transparent = False
        for number in numbers:
            image.seek(number)
            image.load()  # WebP has a frame's delay only then
            transparent = transparent or stills.is_transparent(image)
            delay = float(image.info.get("duration", 0) or 0)
            delays.append(delay if delay >= _SHORTEST_DELAY_MS else _BROWSER_DELAY_MS)
        image.seek(numbers[0])
        shown = stills.shown(image)
        even = len(set(delays)) == 1
        starts = np.concatenate([[0.0], np.cumsum(delays[:-1])]) / 1000
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        old_reading = None
        if numbers[0] > 0:
            old_reading = "an image that is no part of the animation was taken as its first frame"
        elif turned:
            old_reading = "the orientation of animations was ignored"
        return Probe(
            frames=len(numbers),
            height=shown.height,
            width=shown.width,
            fps=1000 * len(numbers) / sum(delays),
            times=None if even else starts.tobytes(),
            old_reading=old_reading,
            notes=(TRANSPARENT,) if transparent else (),
        )


def still(path: Path) -> Frame:
    """(H, W, 3) uint8 RGB. Raises MediaError, and what PIL raises."""
    with _opened(path) as image:
        return np.asarray(stills.shown(image))


def animation_frames(path: Path, indices: Sequence[int]) -> Iterator[Frame]:
    """The frames at `indices` (ascending), (H, W, 3) uint8 RGB each. Raises as `still` does."""
    with _opened(path) as image:
        numbers = _numbers(image)
        for index in indices:
            if index >= len(numbers):
                raise MediaError(f"{path}: the animation ends before frame {index}")
            image.seek(numbers[index])
            yield np.asarray(stills.shown(image))


def _numbers(image: Image.Image) -> range:
    """PIL's numbers of the frames that are shown.

    An APNG may hold a picture for viewers that know no APNG, which is no frame.
    """
    return range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if (hdr := refusal_of_image(path)) is not None:
        raise MediaError(f"{path}: {hdr}")
    with stills.opened(path) as image:
        yield image
