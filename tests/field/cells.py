"""A cell of the matrix: container, codec, oddity, and how such a clip is made."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.field import boxes, ffmpeg
from tests.field.picture import SIZE

FRAMES = tuple(range(60))
"""The numbers of the pictures that a clip is made of, unless its oddity needs others."""

ENDINGS = {"MPEG-TS": "mpg", "MPEG-PS": "mpg"}
MUXERS = {"m4v": ("-f", "ipod"), "MPEG-TS": ("-f", "mpegts"), "MPEG-PS": ("-f", "vob")}

PLAIN = "nothing odd"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One clip. Where no field says otherwise: all of FRAMES, upright, of SIZE, at 24 a second."""

    container: str
    """The ending of its name, or what ENDINGS maps to one."""
    codec: str
    oddity: str = PLAIN
    detail: str = ""
    """Tells cells of the same container, codec and oddity apart."""
    options: Sequence[object] = ()
    """ffmpeg's, of the encoder."""
    inputs: Sequence[object] = ()
    """ffmpeg's, of further inputs: sound, a second video."""
    numbers: Sequence[int] = FRAMES
    """Of the pictures that are encoded."""
    shown: Sequence[int] | None = None
    """Of the pictures that a player shows; None: those that were encoded."""
    size: tuple[int, int] = SIZE
    """Width, height when upright, in stored pixels."""
    shown_size: tuple[int, int] | None = None
    """Width, height as shown; None: `size`."""
    orientation: int = 1
    """How the pictures are stored; something in the file says so."""
    copies: Sequence[tuple[Sequence[object], Sequence[object]]] = ()
    """Passes that copy packets: ffmpeg's options before the input, and after it."""
    edits: Sequence[Callable[[Path], None]] = ()
    """What is changed in the bytes, at last."""
    make_it: Callable[[Path], None] | None = field(default=None, repr=False)
    """Makes the file in place of all this."""
    kind: Literal["video", "auto"] = "video"
    """What `wanprep` reads it as; auto: an animation, which is a video if it moves."""
    fps: float | None = ffmpeg.RATE
    """Frames a second as shown, on average; None: an image."""
    grey: bool = False
    damaged_last: bool = False
    """Cut within a frame: players show what there is of it, or don't. No other may follow."""
    sizes_vary: bool = False
    """Each frame has its own size; `size` is the first one's."""
    program_reads: bool = True
    """False: the ffmpeg program shows something else, or nothing; a comment says why."""

    @property
    def name(self) -> str:
        """The file's name, which is the cell's in REJECTED and in pytest's output."""
        words = " ".join(filter(None, (self.container, self.codec, self.oddity, self.detail)))
        ending = ENDINGS.get(self.container, self.container)
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f".{ending}"

    @property
    def expected(self) -> list[int]:
        """The numbers that a player shows, in order."""
        return list(self.numbers if self.shown is None else self.shown)

    @property
    def expected_size(self) -> tuple[int, int]:
        """Width, height as shown."""
        return self.shown_size or self.size

    def make(self, folder: Path) -> Path:
        """Write the clip into `folder`."""
        path = folder / self.name
        if self.make_it is not None:
            self.make_it(path)
        else:
            muxer = MUXERS.get(self.container, ())
            ffmpeg.encode(
                path,
                *self.options,
                *muxer,
                numbers=self.numbers,
                size=self.size,
                orientation=self.orientation,
                inputs=self.inputs,
            )
            for before, after in self.copies:
                source = path.rename(folder / f"copied-{path.name}")
                ffmpeg.run(*before, "-i", source, "-map", "0", "-c", "copy", *after, *muxer, path)
                source.unlink()
        for edit in self.edits:
            edit(path)
        return path


def oriented(orientation: int, size: tuple[int, int] = SIZE) -> Callable[[Path], None]:
    """Write the display matrix that shows pictures of that orientation upright."""
    stored = size if orientation < 5 else size[::-1]
    return lambda path: boxes.set_orientation(path, orientation, stored)
