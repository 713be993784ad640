"""Videos, counted and timed by what comes out of the decoder; seeking that is proven."""

import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.frames.media_info import MediaError, Probe, Shortcut
from preprocess.frames.orientation import of_display_matrix
from preprocess.frames.timing import rate_and_times
from preprocess.media.probe_cache import ProbeMemo
from preprocess.media.reader import probe, read_frames

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
LENGTH = 700


def ffmpeg(*arguments: object) -> None:
    subprocess.run([FFMPEG, "-loglevel", "error", "-y", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 frames, whose brightness at five places spells their number."""
    folder = tmp_path_factory.mktemp("film")
    bits = "+".join(
        f"between(X,{18 * place},{18 * place + 17})*mod(floor(N/{4**place}),4)*70"
        for place in range(5)
    )
    path = folder / "film.mkv"
    ffmpeg("-f", "lavfi", "-i", f"color=black:s=90x64:r=25:d={LENGTH / 25}",
           "-vf", f"format=gray,geq=lum='20+{bits}'", "-c:v", "ffv1", path)  # fmt: skip
    return path


def number_of(frame: Any) -> int:
    levels = [frame[20:44, 18 * place + 6 : 18 * place + 12].mean() for place in range(5)]
    return sum(round((level - 20) / 70) * 4**place for place, level in enumerate(levels))


# What makes seeking land elsewhere, or not: each is read from the middle.
LONG = {
    "h264.mp4": ["-c:v", "libx264", "-preset", "ultrafast", "-g", "50"],
    "open.mp4": ["-c:v", "libx264", "-x264opts", "open-gop=1:keyint=50", "-preset", "veryfast"],
    "intra-refresh.mp4": ["-c:v", "libx264", "-intra-refresh", "1", "-g", "50", "-preset", "fast"],
    "h264.avi": ["-c:v", "libx264", "-preset", "veryfast", "-g", "50"],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-bf", "2", "-q:v", "3"],
    "hevc.mkv": ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params",
                 "log-level=none:keyint=50:open-gop=1"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "50"],
    "utvideo.avi": ["-c:v", "utvideo"],
}  # fmt: skip


def decoded(
    path: Path, indices: tuple[int, ...], shortcut: Shortcut | None
) -> tuple[list[Any], int]:
    """Frames, and how many were decoded for them."""
    steps: list[None] = []
    frames = list(
        read_frames(path, "video", indices, shortcut, on_progress=lambda: steps.append(None))
    )
    return frames, len(steps)


@pytest.mark.parametrize("name", LONG)
def test_a_clip_from_the_middle(name: str, film: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    levels = ["-vf", "scale=out_range=tv,format=yuv420p"]
    ffmpeg("-i", film, *levels, "-fps_mode", "passthrough", *LONG[name], path)
    seen = probe(path, "video")
    assert (seen.frames, round(seen.fps or 0)) == (LENGTH, 25)
    indices = tuple(range(601, 660, 3))
    frames, steps = decoded(path, indices, None)
    assert [number_of(frame) for frame in frames] == list(indices)
    quick, fewer = decoded(path, indices, seen.shortcut(indices))
    assert all((one == other).all() for one, other in zip(frames, quick, strict=True))
    if name != "utvideo.avi":  # which decord reads, frame by frame
        assert steps > 600 and fewer < 200


def test_a_shortcut_that_leads_elsewhere_is_not_taken(film: Path, tmp_path: Path) -> None:
    """Whatever a seek gives, the frames are those of sequential decoding."""
    path = tmp_path / "a.mp4"
    ffmpeg("-i", film, "-pix_fmt", "yuv420p", *LONG["h264.mp4"], path)
    indices = (500, 520, 540)
    shortcut = probe(path, "video").shortcut(indices)
    assert shortcut is not None and shortcut.frame == 500
    right, _ = decoded(path, indices, None)
    key, *digests = shortcut.digests
    for wrong in (
        replace(shortcut, frame=499),
        replace(shortcut, pts=shortcut.pts + 1),
        replace(shortcut, pts=10**12),
        replace(shortcut, digests=(key ^ 1, *digests)),
        replace(shortcut, digests=(key, digests[0], digests[1] ^ 1, digests[2])),
    ):
        frames, _ = decoded(path, indices, wrong)
        assert all((one == other).all() for one, other in zip(right, frames, strict=True)), wrong


def test_short_videos_carry_nothing_to_seek_by(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:d=4", tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4", "video").key_frames is None


def test_what_a_file_holds_is_remembered_whole(film: Path, tmp_path: Path) -> None:
    seen = probe(film, "video")
    assert seen.key_frames is not None
    uneven = Probe(
        frames=3, height=4, width=6, fps=10.5, times=np.asarray([0.0, 0.1, 0.19]).tobytes(),
        old_reading="why", notes=("odd",), key_frames=seen.key_frames,
    )  # fmt: skip
    image = Probe(frames=1, height=4, width=6, fps=None)
    memo = ProbeMemo(tmp_path / "probes.jsonl")
    for name, one in (("film", seen), ("uneven", uneven), ("image", image)):
        memo.remember(name, "video", one)
    again = ProbeMemo(tmp_path / "probes.jsonl")
    for name, one in (("film", seen), ("uneven", uneven), ("image", image)):
        assert again.known(name, "video") == one
    assert again.known("film", "image") is None


def test_headers_are_not_believed() -> None:
    """600 frames a second, says an AVI; its frames come 24 times a second."""
    tick = Fraction(1, 600)
    shown: list[int | None] = [50, 25, 75, 100]  # H.264 in AVI: not even in order
    fps, times = rate_and_times(shown, [0, 25, 50, 75], tick, [Fraction(600), Fraction(30)])
    assert fps == pytest.approx(24.0) and times is None
    # Times below zero are lost in Matroska: they follow from the others.
    gone: list[int | None] = [None, None, 10, 51, 93, 135]
    fps, times = rate_and_times(gone, [], Fraction(1, 1000), [Fraction(24)])
    assert (fps, times) == (24.0, None)
    # Nothing to go by but the header, and not even that.
    assert rate_and_times([None, None], [], tick, [Fraction(24)]) == (24.0, None)
    assert rate_and_times([0], [0], tick, [None]) == (None, None)


@given(
    gaps=st.lists(st.integers(1, 2000), min_size=1, max_size=60),
    start=st.integers(-500, 5000),
    tick=st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 12288)]),
)
def test_uneven_times_are_those_of_the_frames(gaps: list[int], start: int, tick: Fraction) -> None:
    pts = [start + sum(gaps[:n]) for n in range(len(gaps) + 1)]
    fps, times = rate_and_times(pts, pts, tick, [Fraction(25)])
    exact = np.asarray([float((time - start) * tick) for time in pts])
    assert fps is not None
    found = np.arange(len(pts)) / fps if times is None else times
    assert np.abs(found - exact).max() <= 1.01 * max(float(tick), 0.001)
    if times is not None:
        assert np.abs(times - exact).max() < 1e-9


MATRICES = [(one, 0, 0, other) for one in (-1, 1) for other in (-1, 1)]
MATRICES += [(0, one, other, 0) for one in (-1, 1) for other in (-1, 1)]


@pytest.mark.parametrize(("a", "b", "c", "d"), MATRICES)
def test_the_whole_display_matrix_counts(a: int, b: int, c: int, d: int) -> None:
    """Against the definition: (p, q) is shown at (a·p + c·q, b·p + d·q), moved to begin at 0."""
    rows = [[a << 16, b << 16, 0], [c << 16, d << 16, 0], [0, 0, 1 << 30]]
    found = of_display_matrix(np.asarray(rows, np.int32).tobytes())
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)  # 3 wide, 2 high
    places = {(a * p + c * q, b * p + d * q): frame[q, p] for q in range(2) for p in range(3)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    shown = found.apply(frame)
    assert found.size(3, 2) == (shown.shape[1], shown.shape[0])
    for (x, y), pixel in places.items():
        assert (shown[y - top, x - left] == pixel).all()


def test_odd_angles_are_refused_and_a_matrix_of_zeros_says_nothing() -> None:
    turned = np.asarray([[46341, -46341, 0], [46341, 46341, 0], [0, 0, 1 << 30]], np.int32)
    with pytest.raises(ValueError, match="45 degrees, expected a multiple of 90"):
        of_display_matrix(turned.tobytes())
    assert of_display_matrix(bytes(36)).size(3, 2) == (3, 2)


def test_damage_in_the_middle_is_refused_and_at_the_end_is_not(tmp_path: Path) -> None:
    """ProRes: each frame by itself, so it is known which are hit."""
    path = tmp_path / "a.mov"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=24:d=1", "-c:v", "prores_ks", path)
    whole = path.read_bytes()
    places = [n for n in range(len(whole)) if whole[n : n + 4] == b"icpf"]
    assert len(places) == 24

    def hit(name: str, number: int) -> Path:
        broken = bytearray(whole)
        broken[places[number] : places[number] + 40] = bytes(40)
        (tmp_path / name).write_bytes(bytes(broken))
        return tmp_path / name

    with pytest.raises(MediaError, match=r"middle\.mov: cannot decode the video after frame 8 "):
        probe(hit("middle.mov", 9), "video")
    assert probe(hit("end.mov", 23), "video").frames == 23


def test_recordings_that_were_joined_go_on(tmp_path: Path) -> None:
    """Their times begin anew; the second is as long as the first, not between its frames."""
    one = [6000 + 3750 * n for n in range(48)]
    for shift in (0, 7, -90000):
        joined = one + [time + shift for time in one]
        fps, times = rate_and_times(joined, joined, Fraction(1, 90000), [Fraction(24)])
        assert (fps, times) == (24.0, None)
    path = tmp_path / "a.ts"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=24:d=2", "-c:v", "libx264", path)
    twice = tmp_path / "twice.mpg"
    twice.write_bytes(path.read_bytes() * 2)
    seen = probe(twice, "video")
    assert (seen.frames, seen.fps, seen.times) == (96, 24.0, None)


def test_a_clock_of_few_ticks_is_exact() -> None:
    pts = [n if n <= 10 else n + 1 for n in range(40)]  # the eleventh is held twice as long
    _, times = rate_and_times(pts, pts, Fraction(1, 5), [Fraction(5)])
    assert times is not None and np.allclose(times, np.asarray(pts) / 5)


def test_sound_that_begins_late_in_a_program_stream(tmp_path: Path) -> None:
    """PyAV fails where a stream begins that it has not seen at the start."""
    path = tmp_path / "a.mpg"
    noise = "nullsrc=s=320x240:r=25:d=14,geq=random(1)*255:128:128"
    ffmpeg("-f", "lavfi", "-i", noise, "-itsoffset", 12, "-f", "lavfi", "-i", "sine=d=2",
           "-c:v", "mpeg2video", "-q:v", 3, "-c:a", "mp2", path)  # fmt: skip
    assert probe(path, "video").frames == 350
