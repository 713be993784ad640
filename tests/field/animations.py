"""The animations of the matrix: GIF, WebP, APNG, AVIF, as browsers show them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.field.cells import PLAIN, Cell
from tests.field.picture import picture

NUMBERS = tuple(range(1, 21))
_DELAYS = [40, 100, 250, 30]
_TOO_SHORT = [0, 10, 40, 40]
"""Milliseconds; browsers show those under 20 for 100."""


def animations() -> Iterator[Cell]:
    """Every cell of an animated format."""
    # Of an AVIF the ffmpeg program takes the still that stands for it.
    lossless = {"lossless": True}
    lossy = {"quality": 90, "method": 0}
    formats: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("gif", "GIF", {}),
        ("webp", "WebP", lossless),
        ("apng", "APNG", {}),
        ("avif", "AVIF", {"quality": 90, "speed": 10, "max_threads": 1}),
    )
    for ending, codec, options in formats:
        # 25 frames a second, each shown for 40 ms.
        yield _cell(ending, codec, PLAIN, 25.0, duration=40, **options)
        yield _cell(ending, codec, "delays vary", 20 / 2.1, duration=_DELAYS * 5, **options)
        yield _cell(ending, codec, "delays too short", 20 / 1.4, duration=_TOO_SHORT * 5, **options)
        yield _cell(ending, codec, "one frame", None, numbers=(7,), **options)
    yield _cell("webp", "WebP", PLAIN, 25.0, detail="lossy", duration=40, **lossy)
    yield _cell("png", "APNG", PLAIN, 25.0, detail="named png", duration=40)
    # The first picture is for readers that know no APNG: it is not one of the animation's.
    yield _cell("apng", "APNG", "default image apart", 25.0, numbers=(200, *NUMBERS),
                shown=NUMBERS, duration=40, default_image=True)  # fmt: skip
    yield Cell(container="gif", codec="GIF", oddity="parts of a picture", kind="auto",
               numbers=NUMBERS, fps=25.0, make_it=_save_patches)  # fmt: skip


def _cell(
    ending: str,
    codec: str,
    oddity: str,
    fps: float | None,
    *,
    detail: str = "",
    numbers: Sequence[int] = NUMBERS,
    shown: Sequence[int] | None = None,
    **options: Any,
) -> Cell:
    def make(path: Path) -> None:
        frames = [Image.fromarray(picture(number)) for number in numbers]
        if len(frames) > 1:
            options.update(save_all=True, append_images=frames[1:], loop=0)
        frames[0].save(path, **options)

    return Cell(container=ending, codec=codec, oddity=oddity, detail=detail, kind="auto",
                numbers=numbers, shown=shown, fps=fps, make_it=make,
                program_reads=ending != "avif")  # fmt: skip


def _save_patches(path: Path) -> None:
    """Each frame only a patch that covers what has changed, what has not is transparent in it."""
    frames = [Image.fromarray(picture(number)).quantize(16) for number in NUMBERS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, disposal=1,
                   optimize=True, loop=0)  # fmt: skip
