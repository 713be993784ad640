"""Why decord reads in two pairs alone: of every other there is a file that it reads wrong.

By index it gives other frames than sequential decoding: another picture, other bits, or another
number of them. Where it reads is tested in `test_decord.py`.
"""

from pathlib import Path

import numpy as np
import pytest

from preprocess.media.reader import probe, read_frames
from tests.field import boxes, decord_frames
from tests.field.compare_with_decord import by_pyav
from tests.field.ffmpeg import run

decord = pytest.importorskip("decord")  # there is no wheel for ARM

ENCODERS = {
    "h264": ["-c:v", "libx264", "-g", "12", "-pix_fmt", "yuv420p"],
    "hevc": ["-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "log-level=none:keyint=12"],
    "vp8": ["-c:v", "libvpx", "-g", "12"],
    "vp9": ["-c:v", "libvpx-vp9", "-g", "12", "-deadline", "realtime", "-cpu-used", "8"],
    "mpeg4": ["-c:v", "mpeg4", "-bf", "2", "-g", "12"],
    "mpeg2": ["-c:v", "mpeg2video", "-bf", "2", "-g", "12"],
    "mpeg1": ["-c:v", "mpeg1video", "-bf", "2", "-g", "12"],
    "mjpeg": ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"],
    "prores": ["-c:v", "prores_ks"],
    "dnxhr": ["-c:v", "dnxhd", "-profile:v", "dnxhr_sq", "-pix_fmt", "yuv422p"],
    "ffv1": ["-c:v", "ffv1", "-pix_fmt", "yuv420p"],
    "huffyuv": ["-c:v", "huffyuv", "-pix_fmt", "yuv422p"],
    "utvideo": ["-c:v", "utvideo", "-pix_fmt", "yuv420p"],
    "theora": ["-c:v", "libtheora", "-g", "12"],
    "msmpeg4": ["-c:v", "msmpeg4v3", "-g", "12"],
    "wmv2": ["-c:v", "wmv2", "-g", "12"],
    "sorenson": ["-c:v", "flv", "-g", "12"],
}
BELOW_ZERO = ["-output_ts_offset", "-0.5", "-avoid_negative_ts", "disabled"]


def an_edit_list(path: Path) -> None:
    boxes.set_edits(path, [(1000, 6144)])  # one second, from half a second on, of 12,288 units each


def mirrored(path: Path) -> None:
    boxes.set_orientation(path, 2, by_pyav(path)[0].shape[1::-1])


def no_index(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1")])


# Container → what is odd of it, and the codecs that this is enough for.
ODD = {
    "mp4": (an_edit_list, ["h264", "hevc", "vp9", "mpeg4", "mpeg2"]),
    "mp4, mirrored": (mirrored, ["mjpeg"]),
    "mov": (an_edit_list, ["h264", "hevc", "mpeg4"]),
    "mov, mirrored": (mirrored, ["mjpeg", "prores", "dnxhr"]),
    "m4v": (an_edit_list, ["h264", "mpeg4"]),
    "mkv": (BELOW_ZERO, ["h264", "hevc", "vp8", "vp9", "mpeg4", "mpeg2", "mjpeg", "prores", "ffv1",
                         "huffyuv", "utvideo", "theora"]),
    "webm": (BELOW_ZERO, ["vp8", "vp9"]),
    "avi": (None, ["h264", "mpeg4", "mpeg2"]),
    "avi, without an index": (no_index, ["msmpeg4", "wmv2", "sorenson"]),
    "avi, of odd size": (None, ["mjpeg", "ffv1", "vp8"]),
    "mpg": (None, ["mpeg1", "mpeg2", "h264"]),
}  # fmt: skip


def as_shown(path: Path) -> bool:
    """Whether decord's frames, every second by index, are those of sequential decoding."""
    seen = probe(path, "video")
    indices = range(0, seen.frames, 2)
    try:
        count = decord_frames.frame_count(path)
        read = decord_frames.frames_at(path, indices, (seen.width, seen.height))
    except (decord.DECORDError, IndexError):
        return False
    return count == seen.frames and all(
        np.array_equal(one, other)
        for one, other in zip(read, read_frames(path, "video", indices), strict=True)
    )


@pytest.mark.parametrize(
    ("container", "codec"),
    [(container, codec) for container, (_, codecs) in ODD.items() for codec in codecs],
)
def test_no_other_pair_holds(container: str, codec: str, tmp_path: Path) -> None:
    odd, _ = ODD[container]
    path = tmp_path / f"a.{container.split(',')[0]}"
    size = "97x61" if "odd" in container else "480x270" if codec == "dnxhr" else "96x64"
    run("-f", "lavfi", "-i", f"testsrc=s={size}:r=24:d=2", *ENCODERS[codec],
           *(odd if isinstance(odd, list) else []), path)  # fmt: skip
    if callable(odd):
        odd(path)
    assert not as_shown(path)
