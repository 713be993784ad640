"""Why a file that no decoder opens is broken, in plain words, by what lies in it."""

from pathlib import Path

_START_BYTES = 512
_SHOWN = 40  # characters of a text


def seen(path: Path) -> str | None:
    """What is wrong with a file and what helps; None where nothing is seen. Raises OSError."""
    with path.open("rb") as stream:
        start = stream.read(_START_BYTES)
        if not any(start):
            return "it begins with zeros only: a copy or a download broke off. Fetch it again"
        if (text := _text(start)) is not None:
            return f"it is a text that begins {text[:_SHOWN]!r}. Fetch the file itself"
        if start[4:8] != b"ftyp":
            return None
        at, size = 0, stream.seek(0, 2)
        while at + 8 <= size:
            stream.seek(at)
            header = stream.read(16)
            if header[4:8] == b"moov":
                return None
            length = int.from_bytes(header[:4], "big")
            at += int.from_bytes(header[8:], "big") if length == 1 else length or size
            if length == 1 and len(header) < 16:
                break
    return (
        "its index (moov), which is written last, is missing: a recording or a download broke off. "
        "Fetch it again; no ffmpeg reads such a file"
    )


def _text(start: bytes) -> str | None:
    """The beginning of a file as text; None: it is none."""
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < _START_BYTES - 3:  # else it is a letter that is cut in two
            return None
        text = start[: error.start].decode()
    words = " ".join(text.split())
    return words if words.isprintable() else None
