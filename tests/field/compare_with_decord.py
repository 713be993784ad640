"""Where decord gives the frames that PyAV gives when it decodes in order. Not a test: a table.

    python -m tests.field.compare_with_decord OUT.json OUT.md

For each container and codec, with many settings of the encoder: decord by index at stride 2, by
index from a third on, and in sequence, against PyAV in output order, by the number in the picture,
and to the bit in rgb24.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from tests.field import ffmpeg
from tests.field.picture import Pixels, UnreadableError, see
from tests.field.settings import PAIRS, settings

WAYS = ("stride 2", "window", "next")


class Row(NamedTuple):
    """What came of one clip."""

    container: str
    codec: str
    setting: str
    result: dict[str, Any]


def numbers(frames: list[Pixels]) -> list[str]:
    """What each picture shows: its number, with its orientation where it is not upright."""
    found = []
    for frame in frames:
        try:
            seen = see(frame)
            lying = "" if seen.orientation == 1 else f"/{seen.orientation}"
            found.append(f"{seen.number}{lying}")
        except UnreadableError:
            found.append("?")
    return found


def by_pyav(path: Path) -> list[Pixels]:
    """Every frame in output order, as stored."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        frames: list[Pixels] = []
        for packet in container.demux(stream):
            with contextlib.suppress(av.error.InvalidDataError):
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
        return frames


def by_decord(path: Path) -> tuple[int, dict[str, list[Pixels] | str]]:
    """decord's count, and what each way of reading gives: frames, or the error."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)

    def opened() -> Any:
        return decord.VideoReader(str(path), num_threads=1)

    count = len(opened())

    def at(indices: range) -> list[Pixels]:
        video = opened()
        return [video[index].asnumpy() for index in indices]

    def one_by_one() -> list[Pixels]:
        video = opened()
        return [video.next().asnumpy() for _ in range(count)]

    attempts: dict[str, Callable[[], list[Pixels]]] = {
        "stride 2": lambda: at(range(0, count, 2)),
        "window": lambda: at(range(count // 3, count)),
        "next": one_by_one,
    }
    found: dict[str, list[Pixels] | str] = {}
    for name, attempt in attempts.items():
        try:
            found[name] = attempt()
        except Exception as error:  # a decoder raises anything
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return count, found


def compare(path: Path) -> dict[str, Any]:
    """PyAV, ffmpeg and decord on one file."""
    truth = by_pyav(path)
    result: dict[str, Any] = {"frames": len(truth), "shown": numbers(truth)}
    try:
        result["ffmpeg shows"] = numbers(ffmpeg.decoded(path))
    except RuntimeError as error:
        result["ffmpeg shows"] = str(error)[-200:]
    try:
        count, found = by_decord(path)
    except Exception as error:  # a decoder raises anything
        return result | {"not opened": f"{type(error).__name__}: {error}"[:200]}
    result["count"] = count
    wanted = {
        "stride 2": truth[:count:2],
        "window": truth[count // 3 : count],
        "next": truth[:count],
    }
    for way in WAYS:
        result[way] = _agreement(found[way], wanted[way])
    return result


def _agreement(got: list[Pixels] | str, wanted: list[Pixels]) -> dict[str, Any]:
    if isinstance(got, str):
        return {"order": False, "bits": False, "error": got}
    shown = numbers(got)
    if shown != numbers(wanted):
        return {"order": False, "bits": False, "numbers": shown}
    differences = [
        255 if one.shape != other.shape else int(np.abs(one.astype(int) - other).max())
        for one, other in zip(got, wanted, strict=True)
    ]
    most = max(differences, default=0)
    return {"order": True, "bits": most == 0, "largest difference": most}


def every_pair(folder: Path) -> Iterator[Row]:
    """Each setting of each codec in each of its containers."""
    for container, codecs in PAIRS.items():
        for codec in codecs:
            for setting in settings(codec):
                path = setting.make(folder, container)
                if path is None:
                    print(container, codec, setting.name, "not made", file=sys.stderr)
                    continue
                yield Row(container, codec, setting.name, compare(path))


def report(rows: list[Row]) -> str:
    """A line for each container and codec; where all settings agree it is in bold."""
    lines = [
        "| container | codec | settings | order by index | order by next() | bits | where not |",
        "|---|---|---|---|---|---|---|",
    ]
    for container, codec in dict.fromkeys((row.container, row.codec) for row in rows):
        mine = [row for row in rows if (row.container, row.codec) == (container, codec)]
        opened = [row for row in mine if "not opened" not in row.result]
        unlike = {
            "not opened": [row.setting for row in mine if row not in opened],
            "count": _where(opened, lambda r: r["count"] != r["frames"]),
            "index": _where(
                opened, lambda r: not (r["stride 2"]["order"] and r["window"]["order"])
            ),
            "next": _where(opened, lambda r: not r["next"]["order"]),
            "bits": _where(opened, lambda r: not all(r[way]["bits"] for way in WAYS)),
        }
        counts = [str(len(opened) - len(unlike[what])) for what in ("index", "next", "bits")]
        others = {*unlike["index"], *unlike["next"]}
        unlike["bits"] = [name for name in unlike["bits"] if name not in others]
        where = "; ".join(f"{what}: {', '.join(names)}" for what, names in unlike.items() if names)
        cells = (container, codec, str(len(mine)), *counts, where or "**nowhere**")
        lines.append(f"| {' | '.join(cells)} |")
    unlike_ffmpeg = [
        f"- {row.container} {row.codec} {row.setting}: {row.result['ffmpeg shows']}, "
        f"PyAV {row.result['shown']}"
        for row in rows
        if row.result["ffmpeg shows"] != row.result["shown"]
    ]
    return "\n".join(
        [*lines, "", "Where ffmpeg shows others than PyAV:", *(unlike_ffmpeg or ["nowhere"]), ""]
    )


def _where(rows: list[Row], wrong: Callable[[dict[str, Any]], bool]) -> list[str]:
    return [row.setting for row in rows if wrong(row.result)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        rows_ = list(every_pair(Path(temporary)))
    Path(sys.argv[1]).write_text(json.dumps([row._asdict() for row in rows_]))
    Path(sys.argv[2]).write_text(report(rows_))
