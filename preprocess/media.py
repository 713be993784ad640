"""Opening media: what a file holds, and its frames as uint8 RGB. Sole user of decord and PIL.open.

Whatever is wrong with a file ends as a MediaError whose text names the file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from shared.errors import UserError

Frame = npt.NDArray[np.uint8]
"""(H, W, 3), RGB, 0..255."""

# What 8-bit RGB can hold without a choice that we should not make for the user.
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class MediaError(Exception):
    """A file that cannot be used. The text names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file holds, as it will be seen (after the image's EXIF rotation)."""

    frames: int
    height: int
    width: int
    fps: float | None
    """None for an image."""


def probe(path: Path, kind: Literal["video", "image"]) -> Probe:
    """Read what is needed to choose frames and a bucket. Raises MediaError."""
    if kind == "image":
        with _named_failures(path, "image"), _open_image(path) as image:
            width, height = image.size
            # Orientations 5 to 8 lie on their side.
            if image.getexif().get(0x0112, 1) >= 5:
                width, height = height, width
        return Probe(frames=1, height=height, width=width, fps=None)
    with _named_failures(path, "video"):
        video = _open_video(path)
        if len(video) == 0:
            raise MediaError(f"{path}: the video has no frames")
        height, width, _ = _rgb(video[0].asnumpy(), path).shape
        return Probe(frames=len(video), height=height, width=width, fps=float(video.get_avg_fps()))


def read_frames(
    path: Path, kind: Literal["video", "image"], indices: Sequence[int]
) -> Iterator[Frame]:
    """The frames at `indices` (ascending), one at a time: a long 4K clip need not fit in memory.

    Raises MediaError, at the first frame that cannot be read.
    """
    if kind == "image":
        with _named_failures(path, "image"), _open_image(path) as image:
            upright = ImageOps.exif_transpose(image)
            frame = np.asarray(upright.convert("RGB"))
        yield frame
        return
    with _named_failures(path, "video"):
        video = _open_video(path)
    for index in indices:
        with _named_failures(path, f"frame {index}"):
            frame = _rgb(video[index].asnumpy(), path)
        yield frame


def _rgb(frame: Frame, path: Path) -> Frame:
    """(H, W, 3). Of very narrow videos decord returns lines of another stride as channels."""
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise MediaError(f"{path}: decord reads frames of shape {frame.shape}, expected (H, W, 3)")
    return frame


@contextmanager
def _named_failures(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a MediaError that names the file."""
    try:
        yield
    except (MediaError, UserError):
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{path}: there is no such file") from error
    except Exception as error:  # decoders raise RuntimeError, DECORDError, OSError, SyntaxError …
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{path}: the file is empty (0 bytes)") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MediaError(f"{path}: cannot decode the {what} ({reason})") from error


def _open_image(path: Path) -> Image.Image:
    image = Image.open(path)
    if image.mode not in _EIGHT_BIT_MODES:
        image.close()
        raise MediaError(
            f"{path}: pixels of mode {image.mode} (16 bits or floats) would be clipped; convert "
            "the image to 8 bits"
        )
    return image


def _open_video(path: Path) -> Any:
    """A decord reader, one decoding thread: the clips of several files are decoded side by side."""
    try:
        import decord
    except ImportError as error:
        raise UserError(
            "decord, which reads videos, is not installed (there is no wheel for ARM Linux). "
            "Encode on an x86-64 machine; the shards can be trained on anywhere."
        ) from error
    if not path.exists():
        raise FileNotFoundError(path)
    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(str(path), num_threads=1)
