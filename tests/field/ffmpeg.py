"""The ffmpeg program: it makes the clips, and decodes them in order as the independent truth."""

import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from tests.field.picture import SIZE, Pixels, picture, turned

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
RATE = 24.0
"""Frames a second of the clips, unless their oddity is another."""


def run(*arguments: object, stdin: bytes | None = None) -> bytes:
    """Run ffmpeg; what it writes to stdout. Raises RuntimeError with its last words."""
    command = [FFMPEG, "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    ran = subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)
    if ran.returncode != 0:
        said = ran.stderr.decode(errors="replace").strip()[-600:]
        raise RuntimeError(f"{' '.join(command)}: exit code {ran.returncode}\n{said}")
    return ran.stdout


def raw(numbers: Iterable[int], size: tuple[int, int] = SIZE, orientation: int = 1) -> bytes:
    """rgb24 pictures one after the other, stored as a file of that orientation stores them."""
    return b"".join(
        np.ascontiguousarray(turned(picture(number, size), orientation)).tobytes()
        for number in numbers
    )


def encode(
    path: Path,
    *options: object,
    numbers: Sequence[int],
    size: tuple[int, int] = SIZE,
    orientation: int = 1,
    inputs: Sequence[object] = (),
) -> Path:
    """Pictures that are `size` when upright, encoded with `options` to `path`."""
    width, height = size if orientation < 5 else size[::-1]
    run(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", RATE, "-i", "-"),
        *inputs,
        *options,
        path,
        stdin=raw(numbers, size, orientation),
    )
    return path


def decoded(path: Path) -> list[Pixels]:
    """Every frame in the order in which the program decodes it, upright, as stored in size."""
    lines = run("-i", f"file:{path}", "-an", "-fps_mode", "passthrough", "-f", "framehash",
                "-pix_fmt", "rgb24", "-hash", "crc32", "-").decode()  # fmt: skip
    found = re.search(r"#dimensions 0: (\d+)x(\d+)", lines)
    if found is None:
        return []
    width, height = int(found[1]), int(found[2])
    pixels = run("-i", f"file:{path}", "-an", "-fps_mode", "passthrough", "-f", "rawvideo",
                 "-pix_fmt", "rgb24", "-")  # fmt: skip
    return list(np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3))
