"""Opening media: what a file holds, and its frames as uint8 RGB, as people see it.

Upright (EXIF orientation, display matrix), with square pixels, transparency on white, every frame
of an animation composed. What cannot be shown in 8-bit RGB without a choice that belongs to the
user (HDR, video with alpha, float pixels) is refused with the command that converts it.
`docs/inputs.md` states each case.

Whatever is wrong with a file ends as a MediaError whose text names the file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EIO
from pathlib import Path
from typing import Literal

from preprocess.frames import broken, pictures, video
from preprocess.frames.media_info import Frame, Kind, MediaError, Probe, Shortcut
from shared.errors import UserError


def probe(path: Path, kind: Kind, on_progress: Callable[[], None] = lambda: None) -> Probe:
    """What is needed to choose frames and a bucket: all of a video is decoded for it.

    `on_progress` is called after every frame. Raises MediaError.
    """
    if kind == "auto":
        with _named_failures(path, "image"):
            kind = "video" if pictures.moves(path) else "image"
    with _named_failures(path, kind):
        if kind == "image":
            return pictures.probe_still(path)
        if pictures.is_animation(path):
            return pictures.probe_animation(path)
        return video.survey(path, on_progress)


def read_frames(
    path: Path,
    kind: Literal["video", "image"],
    indices: Sequence[int],
    shortcut: Shortcut | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """The frames at `indices` (ascending), one at a time: a long 4K clip need not fit in memory.

    `shortcut`: where decoding of a long video may begin (`Probe.shortcut`). `on_progress` is called
    after every frame that is decoded. Raises MediaError, at the first frame that cannot be read.
    """
    with _named_failures(path, kind):
        if kind == "image":
            yield pictures.still(path)
        elif pictures.is_animation(path):
            yield from pictures.animation_frames(path, indices)
        else:
            yield from video.frames_at(path, indices, shortcut, on_progress)


@contextmanager
def _named_failures(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a MediaError that names the file."""
    try:
        yield
    except (MediaError, UserError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{path}: there is no such file") from error
    except Exception as error:  # decoders raise FFmpegError, OSError, SyntaxError …
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{path}: the file is empty (0 bytes)") from error
        if isinstance(error, EOFError) or getattr(error, "errno", None) == EIO:
            raise MediaError(
                f"{path}: the {what} has no frames, or the file ends within the first"
            ) from error
        message = getattr(error, "strerror", None) or str(error)  # its path is named already
        reason = (message.strip().splitlines() or [type(error).__name__])[0]
        with suppress(OSError):
            reason = broken.seen(path) or reason
        raise MediaError(f"{path}: cannot decode the {what} ({reason})") from error
