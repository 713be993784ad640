"""Headers edited in bytes: what no encoder writes, but phones, editors and recorders do."""

import struct
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

_WITH_CHILDREN = {b"moov", b"trak", b"mdia", b"udta", b"edts", b"minf", b"stbl"}

# EXIF orientation → (a, b, c, d) of the display matrix that shows it upright. A stored point
# (x, y) is shown at (a x + c y, b x + d y), moved back into view; y points down.
_MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[bytes, int, int]]:
    """(type, start, end) of the boxes of an mp4 between two offsets, and of all within them."""
    found = []
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        length = size or end - start
        found.append((kind, start, start + length))
        if kind in _WITH_CHILDREN:
            found += boxes(data, start + 8, start + length)
        start += length
    return found


def set_orientation(path: Path, orientation: int, size: tuple[int, int]) -> None:
    """Write a display matrix into the first track: stored (width, height), shown upright."""
    data = bytearray(path.read_bytes())
    start = next(start for kind, start, _ in boxes(bytes(data)) if kind == b"tkhd")
    a, b, c, d = _MATRICES[orientation]
    width, height = size
    x = -min(0, a * width, c * height)
    y = -min(0, b * width, d * height)
    at = start + (52 if data[start + 8] == 1 else 40) + 8  # version 1 has 64-bit times
    one = 1 << 16
    struct.pack_into(
        ">9i", data, at, a * one, b * one, 0, c * one, d * one, 0, x * one, y * one, 1 << 30
    )
    path.write_bytes(data)


def set_edits(path: Path, edits: Sequence[tuple[int, int]]) -> None:
    """Replace the first track's edit list: (milliseconds shown, media time in media units).

    The movie header must count in milliseconds and lie behind the pictures, as ffmpeg writes both.
    """
    data = path.read_bytes()
    entries = b"".join(struct.pack(">Iihh", shown, media, 1, 0) for shown, media in edits)
    elst = b"elst" + bytes(4) + struct.pack(">I", len(edits)) + entries
    inner = struct.pack(">I", len(elst) + 4) + elst
    edts = struct.pack(">I", len(inner) + 8) + b"edts" + inner
    found = boxes(data)
    start, end = next((start, end) for kind, start, end in found if kind == b"edts")
    grown = len(edts) - (end - start)
    changed = bytearray(data)
    for kind, outer, outer_end in found:
        if kind in (b"moov", b"trak") and outer < start < outer_end:
            size = struct.unpack_from(">I", data, outer)[0]
            struct.pack_into(">I", changed, outer, size + grown)
    changed[start:end] = edts
    path.write_bytes(changed)


def set_duration(path: Path, seconds: int) -> None:
    """Let the headers of movie, track and medium claim a duration (all three)."""
    data = bytearray(path.read_bytes())
    found = boxes(bytes(data))
    scale = {
        kind: struct.unpack_from(">I", data, start + 20)[0]
        for kind, start, _ in found
        if kind in (b"mvhd", b"mdhd")
    }
    at = {b"mvhd": 24, b"mdhd": 24, b"tkhd": 28}
    for kind, start, _ in found:
        if kind in at:
            units = seconds * scale[b"mdhd" if kind == b"mdhd" else b"mvhd"]
            struct.pack_into(">I", data, start + at[kind], min(units, 0xFFFFFFFF))
    path.write_bytes(data)


def set_matroska_duration(path: Path, milliseconds: float) -> None:
    """Replace the duration of a Matroska or WebM file that has one."""
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88")
    struct.pack_into(">d", data, at + 3, milliseconds)
    path.write_bytes(data)


def cover_first(path: Path) -> None:
    """Move the metadata, with its cover, before the tracks: readers meet the cover first."""
    data = path.read_bytes()
    found = boxes(data)
    moov, moov_end = next((start, end) for kind, start, end in found if kind == b"moov")
    udta, udta_end = next((start, end) for kind, start, end in found if kind == b"udta")
    if moov < data.index(b"mdat"):
        raise ValueError("the movie header must lie behind the pictures")
    children = data[udta:udta_end], data[moov + 8 : udta], data[udta_end:moov_end]
    path.write_bytes(data[: moov + 8] + b"".join(children) + data[moov_end:])


def replace_all(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes that must be there by as many others."""
    data = path.read_bytes()
    if old not in data or len(old) != len(new):
        raise ValueError(f"{path}: cannot replace {old!r} by {new!r}")
    path.write_bytes(data.replace(old, new))


def cut(path: Path, part: float) -> None:
    """Keep a part (0 to 1) of the file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: round(part * len(data))])


def cut_at_packet(path: Path, first: int, last: int | None) -> None:
    """Keep the video's packets from `first`, whole, to the middle of the one numbered `last`.

    In an MPEG-PS, where several may share a sector, from the next that begins its own.
    """
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    begin, end = 0, len(data)
    if first:
        begin = next(place for place in at[first : first + 6] if place is not None)
    if last is not None:
        middle, after = at[last : last + 2]
        if middle is None or after is None:
            raise ValueError(f"{path}: packet {last} shares its sector with another")
        end = (middle + after) // 2
    path.write_bytes(data[begin:end])


def damage_packet(path: Path, number: int, how: str) -> None:
    """Overwrite the second half of one of the video's packets by zeros or noise."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = packets[number]
    if start is None:
        raise ValueError(f"{path}: packet {number} shares its sector with another")
    data = bytearray(path.read_bytes())
    length = size - size // 2
    noise = np.random.default_rng(1).integers(0, 256, length, dtype=np.uint8).tobytes()
    data[start + size // 2 : start + size] = bytes(length) if how == "zeros" else noise
    path.write_bytes(data)
