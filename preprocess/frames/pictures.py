"""Image files through PIL: stills and animations as viewers show them. Sole user of PIL.open.

Upright, on white, every frame of an animation composed. Size and pixels come from `_shown` alone,
so they cannot disagree about which way is up.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from preprocess.frames.media_info import Frame, MediaError, Probe

# What 8-bit RGB can hold without a choice that we should not make for the user.
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}
_SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}

# The formats of `media_info.ANIMATIONS`. PIL reads them when they move, too: FFmpeg does not
# compose a GIF's frames on white.
_ANIMATION = re.compile(rb"GIF8|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|.{4}ftypavi[fs]", re.DOTALL)
_ORIENTATION = 0x0112  # of EXIF; PIL looks for it in XMP, too
_BROWSER_DELAY_MS = 100  # what browsers show where a frame's delay is missing or too short
_SHORTEST_DELAY_MS = 11


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
        shown = _shown(image)
        return Probe(frames=1, height=shown.height, width=shown.width, fps=None)


def probe_animation(path: Path) -> Probe:
    """An animation: frames, and how long each is shown, with browsers' rule for short delays."""
    with _opened(path) as image:
        numbers = _numbers(image)
        delays = []
        for number in numbers:
            image.seek(number)
            image.load()  # WebP has a frame's delay only then
            delay = float(image.info.get("duration", 0) or 0)
            delays.append(delay if delay >= _SHORTEST_DELAY_MS else _BROWSER_DELAY_MS)
        image.seek(numbers[0])
        shown = _shown(image)
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
        )


def still(path: Path) -> Frame:
    """(H, W, 3) uint8 RGB. Raises MediaError, and what PIL raises."""
    with _opened(path) as image:
        return np.asarray(_shown(image))


def animation_frames(path: Path, indices: Sequence[int]) -> Iterator[Frame]:
    """The frames at `indices` (ascending), (H, W, 3) uint8 RGB each. Raises as `still` does."""
    with _opened(path) as image:
        numbers = _numbers(image)
        for index in indices:
            if index >= len(numbers):
                raise MediaError(f"{path}: the animation ends before frame {index}")
            image.seek(numbers[index])
            yield np.asarray(_shown(image))


def _numbers(image: Image.Image) -> range:
    """PIL's numbers of the frames that are shown.

    An APNG may hold a picture for viewers that know no APNG, which is no frame.
    """
    return range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1))


def _shown(image: Image.Image) -> Image.Image:
    """The frame that an image file is at: upright, 8-bit RGB, transparency on white."""
    image.load()  # TIFFs turn upright here; PNGs may have their orientation after the pixels
    return _on_white(ImageOps.exif_transpose(image))


def _on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB. What is transparent shows white, not the colour that happens to lie beneath."""
    if image.mode in _SIXTEEN_BIT_MODES:  # the high byte, as PIL reads 16-bit RGB
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with Image.open(path) as image:
        if image.mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES:
            raise MediaError(
                f"{path}: pixels of mode {image.mode} (32 bits or floats) have no fixed range; "
                "convert the image to 8 bits"
            )
        yield image
