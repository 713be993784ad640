"""Where decord gives the frames that PyAV gives when it decodes in order. Not a test: a table.

    python -m tests.field.compare_with_decord OUT.json OUT.md

For each container and codec, with many settings of the encoder, and for each cell of the matrix:
decord by index at stride 2, by index backwards, and in sequence, against PyAV in output order,
by number in the picture, and to the bit in rgb24.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.field import ffmpeg
from tests.field.cells import ENDINGS, MUXERS
from tests.field.codecs import PLAIN, h264, hevc
from tests.field.picture import SIZE, Pixels, UnreadableError, see

FRAMES = 60


@dataclass(frozen=True)
class Setting:
    name: str
    options: tuple[object, ...]
    size: tuple[int, int] = SIZE
    frames: int = FRAMES
    remux: tuple[object, ...] = ()
    """ffmpeg's arguments of a second pass that copies; -ss stands before the input."""

    def make(self, folder: Path, container: str) -> Path | None:
        """The clip; None where the encoder or the container will not have it."""
        path = folder / f"a.{ENDINGS.get(container, container)}"
        muxer = MUXERS.get(container, ())
        try:
            ffmpeg.encode(path, *self.options, *muxer, numbers=range(self.frames), size=self.size)
            if self.remux:
                source = path.rename(folder / f"source{path.suffix}")
                before, after = (self.remux, ()) if self.remux[0] == "-ss" else ((), self.remux)
                ffmpeg.run(*before, "-i", source, "-c", "copy", *after, *muxer, path)
        except RuntimeError:
            return None
        return path


def numbers(frames: list[Pixels]) -> list[Any]:
    found: list[Any] = []
    for frame in frames:
        try:
            seen = see(frame)
            found.append(seen.number if seen.orientation == 1 else f"{seen.number}/{seen.orientation}")
        except UnreadableError:
            found.append("?")
    return found


def by_pyav(path: Path) -> list[Pixels]:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.thread_count = 1
        frames: list[Pixels] = []
        for packet in container.demux(stream):
            with contextlib.suppress(av.error.InvalidDataError):
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
        return frames


def by_decord(path: Path) -> dict[str, Any]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(str(path), num_threads=1)
    count = len(video)

    def read(reader: Any, order: list[int]) -> list[Pixels]:
        return [reader[index].asnumpy() for index in order]

    def fresh() -> Any:
        return decord.VideoReader(str(path), num_threads=1)

    found: dict[str, Any] = {"count": count}
    attempts: dict[str, Callable[[], list[Pixels]]] = {
        "stride 2": lambda: read(fresh(), list(range(0, count, 2))),
        "window": lambda: read(fresh(), list(range(count // 3, count))),
        "next": lambda: [frame.asnumpy() for frame in (lambda r: (r.next() for _ in range(count)))(fresh())],
    }
    for name, attempt in attempts.items():
        try:
            found[name] = attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    return found


def compare(path: Path) -> dict[str, Any]:
    truth = by_pyav(path)
    result: dict[str, Any] = {"frames": len(truth), "shown": numbers(truth)}
    try:
        program = numbers(ffmpeg.decoded(path))
        result["ffmpeg agrees"] = program == result["shown"]
        if not result["ffmpeg agrees"]:
            result["ffmpeg shows"] = program
    except Exception as error:
        result["ffmpeg agrees"] = str(error)[-200:]
    try:
        found = by_decord(path)
    except Exception as error:
        result["decord"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
        return result
    result["count"] = found["count"]
    result["count equal"] = found["count"] == len(truth)
    count = found["count"]
    expected = {
        "stride 2": truth[:count:2],
        "window": truth[count // 3 : count],
        "next": truth[:count],
    }
    for name, wanted in expected.items():
        got = found[name]
        if isinstance(got, str):
            result[name] = {"order": False, "bits": False, "error": got}
            continue
        shown = numbers(got)
        order = shown == numbers(wanted)
        same_shape = all(a.shape == b.shape for a, b in zip(got, wanted, strict=False))
        differences = [
            int(np.abs(a.astype(int) - b).max()) for a, b in zip(got, wanted, strict=False)
        ] if same_shape else [-1]
        result[name] = {"order": order, "bits": order and len(got) == len(wanted) and not any(differences),
                        "largest difference": max(differences, default=None) if order else None}
        if not order:
            result[name]["numbers"] = shown
    return result


def settings(codec: str) -> Iterator[Setting]:
    plain = tuple(PLAIN[codec])
    base = (256, 128) if codec == "DNxHR" else SIZE
    yield Setting("plain", plain, base)
    for size in ((322, 178), (480, 270)):
        yield Setting(f"{size[0]}x{size[1]}", plain, size, frames=30)
    yield Setting("one frame", plain, base, frames=1)
    yield Setting("bt709", ("-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", *plain), base)
    yield Setting("setsar 2", ("-vf", "setsar=2", *plain), base)
    yield Setting("starts at 1.4 s", plain, base, remux=("-output_ts_offset", "1.4"))
    if "-g" in plain:
        for gop in (1, 5, 250):
            yield Setting(f"g {gop}", (*plain, "-g", gop), base)
        yield Setting("cut by copy at 0.8 s", (*plain, "-g", 24), base, remux=("-ss", "0.8"))
    if codec == "H.264":
        yield Setting("x264 defaults", ("-c:v", "libx264", "-pix_fmt", "yuv420p"))
        yield Setting("x264 defaults 640x360", ("-c:v", "libx264", "-pix_fmt", "yuv420p"), (640, 360))
        for preset in ("ultrafast", "fast", "slow"):
            yield Setting(f"preset {preset}", ("-c:v", "libx264", "-preset", preset, "-pix_fmt", "yuv420p"))
        yield Setting("bf 1", h264(bf=1))
        yield Setting("bf 3", h264(bf=3))
        yield Setting("bf 3 g 250", h264(bf=3, gop=250))
        yield Setting("bf 3 g 48", h264(bf=3, gop=48))
        yield Setting("bf 8 pyramid", h264(bf=8, extra="b-adapt=0:b-pyramid=normal"))
        yield Setting("bf 3 no pyramid", h264(bf=3, extra="b-adapt=0:b-pyramid=none"))
        yield Setting("open GOP", h264(bf=3, extra="open-gop=1:b-adapt=0"))
        yield Setting("intra refresh", h264(bf=0, gop=24, extra="intra-refresh=1"))
        yield Setting("baseline", h264("-profile:v", "baseline"))
        yield Setting("tff", h264(bf=2, extra="tff=1"))
        yield Setting("tff 2", ("-field_order", "tt", "-flags", "+ilme+ildct", *h264(bf=2)))
        yield Setting("fake interlaced", h264(extra="fake-interlaced=1"))
        yield Setting("10 bit", ("-c:v", "libx264", "-pix_fmt", "yuv420p10le"))
        yield Setting("yuv444", h264("-pix_fmt", "yuv444p"))
        yield Setting("full range", ("-vf", "scale=out_range=full", *h264("-color_range", "pc")))
        yield Setting("grey", h264("-pix_fmt", "gray"))
        yield Setting("rgb", ("-c:v", "libx264rgb", "-pix_fmt", "rgb24"))
        yield Setting("bf 3 cut by copy at 0.8 s", h264(bf=3, gop=24), remux=("-ss", "0.8"))
        yield Setting("open GOP cut by copy at 0.8 s", h264(bf=3, gop=24, extra="open-gop=1:b-adapt=0"), remux=("-ss", "0.8"))
    if codec == "HEVC":
        yield Setting("x265 defaults", ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"))
        yield Setting("x265 defaults g 12", ("-c:v", "libx265", "-g", 12, "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"))
        yield Setting("x265 defaults 640x360", ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"), (640, 360))
        yield Setting("bf 3", hevc(bf=3))
        yield Setting("bf 3 g 250", hevc(bf=3, gop=250))
        yield Setting("bf 8", hevc(bf=8, extra="b-adapt=0"))
        yield Setting("open GOP", hevc(bf=3, extra="open-gop=1:b-adapt=0"))
        yield Setting("intra refresh", hevc(gop=24, extra="intra-refresh=1"))
        yield Setting("10 bit", hevc("-pix_fmt", "yuv420p10le"))
        yield Setting("hvc1", hevc("-tag:v", "hvc1"))
        yield Setting("full range", ("-vf", "scale=out_range=full", *hevc("-color_range", "pc")))
        yield Setting("bf 3 cut by copy at 0.8 s", hevc(bf=3, gop=24), remux=("-ss", "0.8"))
        yield Setting("open GOP cut by copy at 0.8 s", hevc(bf=3, gop=24, extra="open-gop=1:b-adapt=0"), remux=("-ss", "0.8"))
    if codec in ("VP8", "VP9"):
        lib = "libvpx" if codec == "VP8" else "libvpx-vp9"
        common = ("-c:v", lib, "-pix_fmt", "yuv420p", "-deadline", "good", "-cpu-used", "5", "-b:v", "1M", "-threads", "1")
        yield Setting("defaults", ("-c:v", lib, "-pix_fmt", "yuv420p", "-cpu-used", "5"))
        yield Setting("alt-ref", (*common, "-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", 24))
        yield Setting("alt-ref g 128", (*common, "-auto-alt-ref", "1", "-lag-in-frames", "25", "-g", 128))
        yield Setting("no alt-ref", (*common, "-auto-alt-ref", "0", "-lag-in-frames", "0"))
        if codec == "VP8":
            yield Setting("error resilient", (*common, "-error-resilient", "1"))
        else:
            yield Setting("10 bit", (*common, "-pix_fmt", "yuv420p10le"))
            yield Setting("yuv444", (*common, "-pix_fmt", "yuv444p"))
            yield Setting("odd size", (*common,), (97, 61))
    if codec == "AV1":
        yield Setting("svt", ("-c:v", "libsvtav1", "-preset", "10", "-svtav1-params", "lp=1", "-g", 24, "-pix_fmt", "yuv420p"))
        yield Setting("aom", ("-c:v", "libaom-av1", "-cpu-used", "8", "-threads", "1", "-g", 24, "-pix_fmt", "yuv420p"))
    if codec in ("MPEG-4", "Xvid", "MPEG-2", "MPEG-1"):
        yield Setting("bf 2", (*plain, "-bf", 2))
        yield Setting("bf 2 g 250", (*plain, "-bf", 2, "-g", 250))
        yield Setting("bf 1", (*plain, "-bf", 1))
        yield Setting("bf 2 closed GOP", (*plain, "-bf", 2, "-flags", "+cgop", "-sc_threshold", "1000000000"))
        yield Setting("bf 2 cut by copy at 0.8 s", (*plain, "-bf", 2, "-g", 24), remux=("-ss", "0.8"))
        if codec in ("MPEG-4", "MPEG-2"):
            yield Setting("odd size", plain, (97, 61), frames=30)
            yield Setting("interlaced", (*plain, "-bf", 2, "-flags", "+ilme+ildct", "-field_order", "tt"))
    if codec in ("MJPEG", "FFV1", "HuffYUV", "Ut Video", "raw", "PNG", "JPEG 2000", "QuickTime RLE"):
        yield Setting("odd size", plain, (97, 61), frames=30)
    if codec == "FFV1":
        for form in ("yuv444p", "gray", "yuv422p10le", "rgb24" if False else "gbrp"):
            yield Setting(form, (*plain, "-pix_fmt", form))
    if codec == "ProRes":
        yield Setting("4444", ("-c:v", "prores_ks", "-profile:v", "4", "-pix_fmt", "yuv444p10le"))
        yield Setting("interlaced", (*plain, "-flags", "+ildct", "-field_order", "tt"))


PAIRS = {
    "mp4": ("H.264", "HEVC", "VP9", "AV1", "MPEG-4", "Xvid", "MPEG-2", "MPEG-1", "MJPEG", "PNG"),
    "m4v": ("H.264", "MPEG-4"),
    "mov": ("H.264", "HEVC", "MPEG-4", "MPEG-2", "MJPEG", "ProRes", "DNxHR", "QuickTime RLE", "PNG", "H.263"),
    "mkv": ("H.264", "HEVC", "VP8", "VP9", "AV1", "MPEG-4", "Xvid", "MPEG-2", "MPEG-1", "MJPEG", "ProRes", "FFV1", "HuffYUV", "Ut Video", "raw", "Theora", "MS MPEG-4", "WMV2"),
    "webm": ("VP8", "VP9", "AV1"),
    "avi": ("H.264", "VP8", "VP9", "MPEG-4", "Xvid", "MPEG-2", "MJPEG", "FFV1", "HuffYUV", "Ut Video", "raw", "MS MPEG-4", "WMV2", "Cinepak", "H.263", "Sorenson"),
    "MPEG-PS": ("MPEG-1", "MPEG-2", "H.264", "MPEG-4"),
    "MPEG-TS": ("H.264", "HEVC", "MPEG-2"),
}  # fmt: skip


def every_pair(folder: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for container, codecs in PAIRS.items():
        for codec in codecs:
            for setting in settings(codec):
                path = setting.make(folder, container)
                if path is None:
                    print(container, codec, setting.name, "not made", file=sys.stderr)
                    continue
                yield container, codec, setting.name, compare(path)


def good(result: dict[str, Any], what: str) -> bool:
    return "count equal" in result and all(result[name][what] for name in ("stride 2", "window", "next"))


def report(rows: list[tuple[str, str, str, dict[str, Any]]]) -> str:
    pairs: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for container, codec, name, result in rows:
        pairs.setdefault((container, codec), []).append((name, result))
    lines = [
        "| container | codec | settings | opens | count | order, by index (stride 2; window) | order, next() | bits | where not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (container, codec), settings_ in pairs.items():
        total = len(settings_)
        opened = [(n, r) for n, r in settings_ if "count equal" in r]
        counts = [n for n, r in opened if not r["count equal"]]
        index = [n for n, r in opened if not (r["stride 2"]["order"] and r["window"]["order"])]
        after = [n for n, r in opened if not r["next"]["order"]]
        bits = [n for n, r in opened if not good(r, "bits")]
        closed = [n for n, r in settings_ if "count equal" not in r]
        only_bits = [f"{n} (≤{r['next'].get('largest difference')})" for n, r in opened if n in bits and n not in index and n not in after]
        where = "; ".join(f"{what}: {', '.join(names)}" for what, names in
                          (("not opened", closed), ("count", counts), ("index", index), ("next", after), ("bits only", only_bits)) if names)  # fmt: skip
        ok = "**all equal to the bit**" if not (closed or counts or index or after or bits) else where
        lines.append(f"| {container} | {codec} | {total} | {len(opened)} | {len(opened) - len(counts)} | {len(opened) - len(index)} | {len(opened) - len(after)} | {len(opened) - len(bits)} | {ok} |")
    disagree = [f"- {c} {k} {n}: ffmpeg {r['ffmpeg shows'] if 'ffmpeg shows' in r else r['ffmpeg agrees']} PyAV {r['shown']}" for c, k, n, r in rows if r["ffmpeg agrees"] is not True]
    return "\n".join([*lines, "", "PyAV in order is not what the ffmpeg program shows:", *(disagree or ["nowhere"])]) + "\n"


if __name__ == "__main__":
    lines_, table = Path(sys.argv[1]), Path(sys.argv[2])
    rows_: list[tuple[str, str, str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for row in every_pair(Path(temporary)):
            rows_.append(row)
            c, k, n, r = row
            if len(rows_) % 20 == 0:
                table.write_text("Not finished yet.\n\n" + report(rows_))
    lines_.write_text(
        json.dumps([{"container": c, "codec": k, "setting": n, **r} for c, k, n, r in rows_])
    )
    table.write_text(report(rows_))
