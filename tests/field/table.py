"""The table of docs/inputs.md, made from the matrix. `python -m tests.field.table` writes it."""

from collections.abc import Iterable
from pathlib import Path

import shared
from tests.field.cells import PLAIN, Cell
from tests.field.clips import CELLS
from tests.field.rejected import REJECTED

PAGE = Path(shared.__file__).parent.parent / "docs" / "inputs.md"
BEGIN = "<!-- made by `python -m tests.field.table` -->"
END = "<!-- end of what it made -->"

CONTAINERS = {
    "MPEG-PS": "mpg (PS)",
    "MPEG-TS": "mpg (TS)",
}
"""What a container is called, where that is not its ending."""

_ALONE = ("GIF", "WebP", "APNG", "AVIF", "none", "unknown")
"""Codecs that the container says, or that there is none."""

EVERY_FRAME = "every frame, in the order in which they are shown"
SHOWN_ONLY = "only what the list shows"
AS_COUNTED = "every frame; the rate is that of the frames' own times"
UPRIGHT = "upright, as players show it"

READ = {
    "B-frames": EVERY_FRAME,
    "packed B-frames": EVERY_FRAME,
    "open GOP": EVERY_FRAME,
    "intra refresh": EVERY_FRAME,
    "hidden frames": "without the hidden ones (alt-ref)",
    "edit list": f"{SHOWN_ONLY} (a clip cut by copying)",
    "edit list that delays": "every frame",
    "edit list of two parts": SHOWN_ONLY,
    "edit list that ends early": SHOWN_ONLY,
    "variable frame rate": "every frame that is shown; `--fps` goes by their times",
    "wrong frame rate in the header": AS_COUNTED,
    "no duration": "every frame (a recording that was piped)",
    "fragmented": "every frame",
    "duration too long": AS_COUNTED,
    "times below 0": "every frame, those before 0 too",
    "times that wrap around": AS_COUNTED,
    "no container": "every frame (a bare stream without times)",
    "mirrored": UPRIGHT,
    "turned": UPRIGHT,
    "turned and mirrored": UPRIGHT,
    "odd size": "as it is",
    "non-square pixels": "stretched to square pixels: the side that is too short grows",
    "size changes": "each frame in its own size, fitted to the first one's bucket",
    "10 bit": "8 bit",
    "grey": "RGB",
    "4:4:4": "RGB",
    "RGB": "as it is",
    "full range": "RGB of the same levels",
    "interlaced": "both fields as one picture; the command names such videos",
    "longer sound": "the video's frames",
    "two videos": "the one that players show",
    "cover": "the video, not the cover",
    "time code": "the video",
    "one frame": "a video of one frame; of an animation an image",
    "name of another container": "by its content",
    "cut off": "what is whole, if the file can be opened; the last B-frames as players show them",
    "starts without a key frame": "from the first key frame on",
    "delays vary": "every frame; `--fps` goes by their times",
    "delays too short": "as browsers: those of 10 ms and less count as 100 ms",
    "default image apart": "the animation without it",
    "parts of a picture": "composed",
}
"""Oddity → what is read."""

REFUSED = {
    "alpha": "what lies beneath alpha is not meant to be seen; the message has a command",
    "HDR": "8-bit RGB would show it washed out; the message has a command",
    "Dolby Vision": "without a picture for others its colours would be wrong",
    "cut off": "nothing can be opened without the index, which lies at the end",
    "sound only": "no video stream; a cover is none",
    "no frames": "there is nothing to see",
    "empty file": "0 bytes",
    "unknown codec": "FFmpeg has no decoder",
    "no video at all": "a web page, an error message saved under a video's name",
}
"""Oddity → why it is refused."""


def table() -> str:
    """Markdown between the two marks, these included."""
    read = [cell for cell in CELLS if cell.name not in REJECTED]
    refused = [cell for cell in CELLS if cell.name in REJECTED]
    lines = [
        BEGIN,
        f"Tried with {len(CELLS)} clips: {len(read)} are read, frame by frame as players show",
        f"them; {len(refused)} are refused.",
        "",
        "| container | codecs, with nothing odd |",
        "|---|---|",
    ]
    plain = [cell for cell in read if cell.oddity == PLAIN]
    for container in _distinct(cell.container for cell in plain):
        codecs = _distinct(cell.codec for cell in plain if cell.container == container)
        lines.append(f"| {_called(container)} | {', '.join(codecs)} |")
    lines += ["", "| oddity | what is read | tried in |", "|---|---|---|"]
    for oddity, what in READ.items():
        lines.append(f"| {oddity} | {what} | {_where(read, oddity)} |")
    lines += ["", "| refused | why | tried in |", "|---|---|---|"]
    for oddity, why in REFUSED.items():
        lines.append(f"| {oddity} | {why} | {_where(refused, oddity)} |")
    return "\n".join([*lines, END])


def put_into(page: str) -> str:
    """The page with today's table in the place of the one that it has."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + table() + after


def _where(cells: Iterable[Cell], oddity: str) -> str:
    """`mp4, mov: H.264; mkv: H.264, HEVC`: containers with the same codecs together."""
    found = [cell for cell in cells if cell.oddity == oddity]
    codecs: dict[tuple[str, ...], list[str]] = {}
    for container in _distinct(cell.container for cell in found):
        theirs = _distinct(cell.codec for cell in found if cell.container == container)
        codecs.setdefault(tuple(theirs), []).append(_called(container))
    animated = [name for (codec, *_), names in codecs.items() for name in names if codec in _ALONE]
    groups = [
        f"{', '.join(containers)}: {', '.join(theirs)}"
        for theirs, containers in codecs.items()
        if theirs[0] not in _ALONE
    ]
    return "; ".join([*groups, *([", ".join(animated)] if animated else [])])


def _called(container: str) -> str:
    return CONTAINERS.get(container, container)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text()))
