"""Where decord reads: in the pairs of container and codec in which it is right, to the bit.

Its `video[index]` seeks, and is as quick at the end of a long recording as at its start. In these
pairs, in which every picture is a key frame and no edit list or time below zero can lie, it gives
the frames of sequential decoding on every setting of `tests/field/test_decord.py`; each other pair
fails on one (`docs/decisions.md` has the table). A pair that fails once is taken out here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from preprocess.frames.first_rule import PAIRS, same_colours
from preprocess.frames.media_info import Frame


def is_avi(path: Path) -> bool:
    """Whether a file is of the container that all pairs have, by its first bytes."""
    with path.open("rb") as stream:
        start = stream.read(12)
    return start[:4] == b"RIFF" and start[8:] == b"AVI "


def reads(container: str, codec: str, pixel_format: str, width: int, height: int) -> bool:
    """Whether decord gives the frames of such a video, and is installed (not on ARM Linux)."""
    if (container, codec) not in PAIRS or not same_colours(pixel_format, width, height):
        return False
    try:
        import decord
    except ImportError:
        return False
    decord.logging.set_level(decord.logging.QUIET)
    return True


def frames(path: Path, indices: Sequence[int]) -> Iterator[Frame]:
    """The frames at `indices`, (H, W, 3) uint8 RGB as stored, up to the first that decord fails at.

    In a truncated file it fails by chance: it reads ahead, into the part that is missing.
    """
    import decord

    try:
        # Absolute: a colon in a relative name ends a protocol's.
        video = decord.VideoReader(str(path.absolute()), num_threads=1)
        for index in indices:
            yield video[index].asnumpy()
    except (decord.DECORDError, IndexError, RuntimeError, UnicodeEncodeError):  # of the name
        return
