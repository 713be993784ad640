"""Where a media file's bytes are, and how a decoder gets them: as a local file while it reads.

Decoders want files with a path. What lies elsewhere (inside a tar) is copied to a file without a
name, which is gone with the process that reads it, however that ends.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from preprocess.frames.media_info import MediaError
from preprocess.media.remote import RemoteFile
from shared.io.hashing import FileHasher, stamp_of

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A file inside an uncompressed tar. Its `str` names it in messages."""

    tar: Path
    name: str
    """As the tar says. Only a name: nothing is ever written to it."""
    offset: int
    """Where in the tar its bytes begin."""
    length: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def exists(self) -> bool:
        """Whether it seems to be there, without reading it."""
        return self.tar.exists()

    def stamp(self) -> str:
        """Another string once its content is another: what a digest is remembered by.

        Raises OSError if the tar is not there.
        """
        return f"{stamp_of(self.tar)}|{self.name}|{self.offset}|{self.length}"

    def content(self) -> Iterator[bytes]:
        """Its bytes. Raises OSError, or MediaError where they can't be had."""
        left = self.length
        with self.tar.open("rb") as stream:
            stream.seek(self.offset)
            while left:
                block = stream.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise MediaError(f"{self}: the tar ends {left} bytes before the file does")
                left -= len(block)
                yield block


MediaFile = Path | TarMember | RemoteFile
"""A file of its own, or one that has the methods of `TarMember`."""


def stamp(media_file: MediaFile, hasher: FileHasher) -> str | None:
    """What the hasher remembers the media file by; None where it cannot be asked for."""
    with suppress(OSError, RuntimeError):  # missing, a name too long, a loop of links
        return hasher.name(media_file) if isinstance(media_file, Path) else media_file.stamp()
    return None


@contextmanager
def local_file(
    media_file: MediaFile, on_progress: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A path at which the media file can be read while the block runs.

    MediaErrors that name this path leave the block naming the media file. `on_progress` is called
    after every few megabytes that are copied.
    """
    if isinstance(media_file, Path):
        yield media_file
        return
    named = not Path("/proc/self/fd").is_dir()  # elsewhere an open file has no path but its own
    with tempfile.NamedTemporaryFile() if named else tempfile.TemporaryFile() as file:
        try:
            for block in media_file.content():
                file.write(block)
                on_progress()
            file.flush()
        except OSError as error:
            raise MediaError(f"{media_file}: cannot be read ({error})") from error
        path = Path(file.name if named else f"/proc/{os.getpid()}/fd/{file.fileno()}")
        try:
            yield path
        except MediaError as error:
            raise MediaError(str(error).replace(str(path), str(media_file))) from error
