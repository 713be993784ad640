"""A tar read once from its start to its end, hashed on the way.

`shared.format.tar` reads headers alone, and stops at the first thing that is not as it should be;
here every byte is read, and as many members as there are.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from shared.format import tar
from shared.format.tar import BLOCK

_READ_BYTES = 1 << 22


class TarDamage(Exception):
    """Why a tar cannot be read on."""

    def __init__(self, text: str, *, offset: int, truncated: bool = False) -> None:
        super().__init__(text)
        self.offset = offset
        """Where in the tar."""
        self.truncated = truncated


class HashedStream:
    """A file read forwards: SHA-256 and number of the bytes so far."""

    def __init__(self, stream: IO[bytes], on_bytes: Callable[[int], None]) -> None:
        self._stream = stream
        self._on_bytes = on_bytes
        self._sha256 = hashlib.sha256()
        self._untold = 0
        self.offset = 0

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end of the file."""
        data = self._stream.read(size)
        self._sha256.update(data)
        self.offset += len(data)
        self._untold += len(data)
        if self._untold >= _READ_BYTES:
            self._tell()
        return data

    def _tell(self) -> None:
        self._on_bytes(self._untold)
        self._untold = 0

    def skip(self, size: int) -> int:
        """Read and forget; how many bytes there were."""
        start = self.offset
        while left := start + size - self.offset:
            if not self.read(min(left, _READ_BYTES)):
                break
        return self.offset - start

    def hexdigest(self) -> str:
        """Of the whole file: reads what is left of it."""
        while self.read(_READ_BYTES):
            pass
        self._tell()
        return self._sha256.hexdigest()


@dataclass(frozen=True)
class Member:
    """A file in a tar. Its bytes can be read until the next member is asked for."""

    key: str
    suffix: str
    offset: int
    """Where its bytes begin."""
    size: int
    read: Callable[[], bytes]


def members(stream: HashedStream) -> Iterator[Member]:
    """Every member, in order. Raises TarDamage where the tar is not what a writer of ours left."""
    while True:
        start = stream.offset
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(
                f"the file ends at byte {stream.offset}, without a tar's end",
                offset=start,
                truncated=True,
            )
        if not any(header):
            _check_end(stream)
            return
        try:
            info = tar.member_at(header, start)
        except tar.TarError as error:
            raise TarDamage(str(error), offset=start) from error
        begin, padded = stream.offset, -(-info.size // BLOCK) * BLOCK
        ended = TarDamage(f"the file ends inside {info.name}", offset=start, truncated=True)

        def read(begin: int = begin, size: int = info.size, ended: TarDamage = ended) -> bytes:
            assert stream.offset == begin, "read once, before the next member"
            data = stream.read(size)
            if len(data) < size:
                raise ended
            return data

        yield Member(info.key, info.suffix, begin, info.size, read)
        left = begin + padded - stream.offset
        if stream.skip(left) < left:
            raise ended


def _check_end(stream: HashedStream) -> None:
    """After the first zero block: zeros to the end of the file, one block of them at least."""
    start, zeros = stream.offset, 0
    while block := stream.read(_READ_BYTES):
        if any(block):
            raise TarDamage(f"bytes after the tar's end at byte {start}", offset=start)
        zeros += len(block)
    if zeros < BLOCK:
        raise TarDamage(
            f"the file ends at byte {stream.offset}, without a tar's end",
            offset=start,
            truncated=True,
        )
