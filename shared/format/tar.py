"""The tars of a cache, read strictly, by their headers only.

A shard is a plain ustar tar of regular files `KEY.suffix`: no folders, links, devices or extension
headers, nothing before, between or after. So there is nothing to extract and nothing to interpret,
and whatever else a file holds is refused before a byte of it is used. (`tarfile`, which reads all
kinds of tar that there are, takes a tar that was cut between two members for a whole one.)
"""

import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Size = TypeVar("Size", int, npt.NDArray[np.int64])

BLOCK = 512
MOST_PADDING = 1 << 20
"""Zeros after the last member: tar programs fill up a record, which is rarely above 10 KiB."""

_TRUNCATED = "it ends without the two blocks of zeros that close a tar: it is truncated"
_ZEROS = bytes(BLOCK)
_REGULAR = b"0"
_MAGIC = b"ustar\x0000"
_NO_LINK = bytes(100)
_NO_PREFIX = bytes(155)
_NAME = re.compile(rb"([0-9a-f]{32})\.([a-z][a-z0-9.]{0,62})\0+")
_SIZE = re.compile(rb"[0-7]{11}[\0 ]")
_CHECKSUM = re.compile(rb"[0-7]{6}(?:\0 | \0|\0\0)")


class TarError(ValueError):
    """What is wrong with a tar."""

    def __init__(
        self, text: str, offset: int, *, truncated: bool = False, key: str | None = None
    ) -> None:
        super().__init__(text)
        self.offset = offset
        """Where in the tar the header lies that cannot be used, or what follows its end."""
        self.truncated = truncated
        """Whether the tar ends too early."""
        self.key = key
        """Of the member in which it ends."""


class Member(NamedTuple):
    """One file inside."""

    key: str
    suffix: str
    offset: int
    """Where its bytes begin, in the tar."""
    size: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.suffix}"

    def read(self, stream: BinaryIO, most: int) -> bytes:
        """Its first `most` bytes, out of the tar `stream`."""
        stream.seek(self.offset)
        return stream.read(min(self.size, most))


def room(size: Size) -> Size:
    """Bytes that a member of `size` bytes takes in a tar: its header, itself, and the padding."""
    return BLOCK * (1 + -(-size // BLOCK))


def members(stream: BinaryIO, size: int, suffixes: Sequence[str]) -> Iterator[Member]:
    """`files`, which must be samples: those of one key lie together, in the order of `suffixes`,
    each once. Raises TarError at the first thing that a cache's tar does not have.
    """
    order = {suffix: position for position, suffix in enumerate(suffixes)}
    seen: set[str] = set()
    key, last = "", -1
    for member in files(stream, size):
        position = order.get(member.suffix)
        if position is None:
            raise TarError(f"unexpected member {member.name}", member.offset)
        if member.key != key:
            key, last = member.key, -1
            if key in seen:
                raise TarError(f"the sample of member {member.name} occurs twice", member.offset)
            seen.add(key)
        if position <= last:
            why = f"member {member.name} occurs twice or is out of order"
            raise TarError(why, member.offset)
        last = position
        yield member


def files(stream: BinaryIO, size: int) -> Iterator[Member]:
    """The files of a tar of `size` bytes, in order. The caller may move `stream` as it likes.

    Raises TarError at the first thing that a cache's tar does not have; the caller has seen the
    files before it. Each is read from its header to its end, so `stream` may be one that only goes
    forwards, as long as the caller does, too.
    """
    position = 0
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if header == _ZEROS:
            break
        if len(header) < BLOCK:
            raise TarError(_TRUNCATED, position, truncated=True)
        member = _member_at(header, position)
        if position + room(member.size) > size:
            left = max(size - member.offset, 0)
            why = f"{member.name} claims {member.size} bytes, the file has {left} left"
            raise TarError(why, position, truncated=True, key=member.key)
        yield member
        position += room(member.size)
    rest = size - position
    if size % BLOCK or rest < 2 * BLOCK:
        raise TarError(_TRUNCATED, position, truncated=True)
    if rest > MOST_PADDING:
        why = f"{rest} bytes follow its last member, expected at most {MOST_PADDING}"
        raise TarError(why, position)
    if stream.read(rest - BLOCK) != bytes(rest - BLOCK):
        raise TarError(f"something follows its end, which is at byte {position}", position)


def _member_at(header: bytes, position: int) -> Member:
    """The file that a header (512 bytes) at `position` announces. Raises TarError."""
    if header[257:265] != _MAGIC:
        raise TarError(f"no ustar header at byte {position}", position)
    checksum = header[148:156]
    if not _CHECKSUM.fullmatch(checksum) or int(checksum[:6], 8) != (
        sum(header) - sum(checksum) + 8 * ord(" ")
    ):
        raise TarError(f"the header at byte {position} has a wrong checksum", position)
    name = _NAME.fullmatch(header[:100])
    if name is None:
        shown = header[:100].rstrip(b"\0").decode(errors="replace")
        raise TarError(f"unexpected member {shown!r}", position)
    if header[156:157] != _REGULAR or header[157:257] != _NO_LINK:
        raise TarError(f"the member at byte {position} is no regular file", position)
    if header[345:500] != _NO_PREFIX:
        raise TarError(f"the member at byte {position} lies in a folder", position)
    length = header[124:136]
    if not _SIZE.fullmatch(length):
        raise TarError(f"the header at byte {position} has no size", position)
    return Member(name[1].decode(), name[2].decode(), position + BLOCK, int(length[:11], 8))
