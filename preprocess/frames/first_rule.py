"""The first frame rule: what wandistill once read of a file, and whether that was what is shown.

It took frames by seeking (decord's `video[index]`), which in many files lands elsewhere. Its caches
stay in use; a file of which it read other pictures, or may have, gets other keys under today's rule
(`FRAME_RULE` in `shared.format.fingerprint`), so that its samples are encoded again and no others.
The test of `misread` is that decord and sequential decoding differ in no file that it passes
(`tests/field/`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from av.packet import Packet
from av.video.frame import PictureType, VideoFrame

from preprocess.frames.media_info import Probe
from preprocess.frames.orientation import UPRIGHT, Orientation
from preprocess.frames.picks import picks_of
from shared.format.buckets import nearest_base

PAIRS = frozenset({("avi", "huffyuv"), ("avi", "utvideo")})
"""(container, codec), by FFmpeg's names, in which decord was right in all that was tried."""

# Only what was tried: in these decord's frames were those of sequential decoding, to the bit, if
# nothing else was odd.
_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4 or mov", "matroska,webm": "mkv or webm"}
_CODECS = ("h264", "hevc", "vp8", "vp9", "mjpeg", "prores")
_PIXEL_FORMATS = (
    *("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"),
    *("nv12", "gray", "gbrp", "rgb24", "bgr24", "yuv422p10le", "yuv444p10le"),
)


class StoredPacket(NamedTuple):
    pts: int | None
    dts: int | None
    key: bool
    discarded: bool
    """Decoded but not shown: an edit list cuts it off."""
    partial: bool
    """The file ends before it does. (In transport streams it may be marked so and be whole.)"""


@dataclass(kw_only=True)
class Stored:
    """How a video lies in its file, as far as it decides what the first rule read."""

    container: str
    codec: str
    streams: int
    """Video streams in the file."""
    rotate_tag: bool = False
    """The stream has a tag `rotate`, of before there were display matrices."""
    aspects_differ: bool = False
    """Container and codec disagree about the shape of a pixel."""
    packets: list[StoredPacket] = field(default_factory=list)
    """In decoding order."""
    layouts: dict[tuple[str, int, int], None] = field(default_factory=dict)
    """(pixel format, width, height) of the frames that are shown, that of the first one first."""
    orientations: set[Orientation] = field(default_factory=set)
    each_has_orientation: bool = True
    """Whether each frame came with its own: from the container, not from the pictures."""
    intra: set[int | None] = field(default_factory=set)
    """pts of frames that need no other."""

    def note_packet(self, packet: Packet) -> None:
        """A packet, before it is decoded."""
        self.packets.append(
            StoredPacket(
                pts=packet.pts,
                dts=packet.dts,
                key=bool(packet.is_keyframe),
                discarded=bool(packet.is_discard),
                partial=bool(packet.is_corrupt),
            )
        )

    def note_frame(self, frame: VideoFrame, orientation: Orientation, *, own: bool) -> None:
        """A frame that is shown; `own`: its orientation came with it, not with one before."""
        self.layouts[frame.format.name, frame.width, frame.height] = None
        if frame.pict_type == PictureType.I:
            self.intra.add(frame.pts)
        self.orientations.add(orientation)
        self.each_has_orientation = self.each_has_orientation and own


def misread(stored: Stored, pts: Sequence[int | None]) -> str | None:
    """Why the first rule may have read other pictures than are shown; None: it read these.

    `pts` of the frames that are shown, in order.
    """
    times = [packet.pts for packet in stored.packets]
    keys = {packet.pts for packet in stored.packets if packet.key}
    pixel_format, width, height = layout = next(iter(stored.layouts))
    if (stored.container, stored.codec) in PAIRS and same_colours(*layout):
        whole = len(pts) == len(stored.packets)
        return None if whole else "a damaged frame at the end was counted"
    if stored.container not in _CONTAINERS:
        return f"frames of {stored.container} files were taken by seeking, which lands elsewhere"
    if stored.codec not in _CODECS:
        return f"frames of {stored.codec} video were taken by seeking, which may land elsewhere"
    if not same_colours(*layout):
        size = f"{width}x{height}"
        return f"colours of {pixel_format} video of {size} were converted in another way"
    if not all(orientation.turned_only for orientation in stored.orientations):
        return "mirrored video was shown upside down or not mirrored"
    if stored.orientations != {UPRIGHT} and (
        not stored.each_has_orientation
        or stored.container == "matroska,webm"
        or len(stored.orientations) > 1
    ):
        return "rotation stored by Matroska, or in the video stream itself, was ignored"
    if stored.rotate_tag and stored.orientations == {UPRIGHT}:
        return "video with a tag `rotate` was rotated, which players no longer do"
    if any(one.transposed for one in stored.orientations) and "422" in pixel_format:
        return f"colours of rotated {pixel_format} video were converted in another way"
    if stored.streams > 1 or stored.aspects_differ or len(stored.layouts) > 1:
        return "another stream, pixel shape or frame size of the file may have been taken"
    if any(packet.discarded for packet in stored.packets):
        return "frames that an edit list hides were counted"
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times) or known != list(pts):
        return "frames were counted from packets, which are not what is shown"
    if not keys or not stored.packets[0].key or not keys <= stored.intra:
        return "seeking landed on frames that need earlier ones (no key frame, intra refresh)"
    if pts[0] is not None and pts[0] < 0:
        return "times below zero: seeking landed elsewhere"
    if _open_gop(stored.packets):
        return "frames before an open GOP's key frame were taken without those that they need"
    return None


def same_colours(pixel_format: str, width: int, height: int) -> bool:
    """Whether FFmpeg of today and that of decord (4.1) convert to the same RGB, to the bit.

    They do not where they have to interpolate colours: of more than 8 bits at half the lines, and
    of odd sizes.
    """
    return pixel_format in _PIXEL_FORMATS and width % 2 == height % 2 == 0


def wrong_sample(info: Mapping[str, Any], probe: Probe, media: Mapping[str, Any]) -> str | None:
    """Why a sample of the first frame rule does not hold what is shown there; None: it does.

    `info`: its `KEY.json`. `media`: that group of its shard's fingerprint. With settings of a
    --dataset-config, which the fingerprint does not have, frame rates are not looked at.
    """
    if info.get("frame_rule", 1) != 1 or info["type"] == "text":
        return None
    if probe.old_reading is not None:
        return probe.old_reading
    width, height = info.get("source_width"), info.get("source_height")
    if (
        isinstance(width, int)
        and isinstance(height, int)
        and _other_bucket((width, height), (probe.width, probe.height), media)
    ):
        return (
            f"the source was taken for {width}x{height}, it is shown as "
            f"{probe.width}x{probe.height}"
        )
    fps, most = media.get("fps"), media.get("video_sample_n_frames")
    if info["type"] == "video" and isinstance(fps, int | float) and isinstance(most, int):
        chunks = media.get("clips") == "chunk"
        return _wrong_rate(info, probe, float(fps), most, chunks=chunks)
    return None


def _other_bucket(one: tuple[int, int], other: tuple[int, int], media: Mapping[str, Any]) -> bool:
    """Whether sources of these (width, height) go to buckets of different shapes."""
    if media.get("enable_bucket") is False or isinstance(media.get("fix_sample_size"), list):
        return False
    return nearest_base(*one[::-1]) != nearest_base(*other[::-1])


def _wrong_rate(
    info: Mapping[str, Any], probe: Probe, fps: float, most: int, *, chunks: bool
) -> str | None:
    """The same for a clip of `fps` frames a second, `most` at most.

    `chunks`: its times are counted from the source's first frame, as of a run of clips.
    """
    taken = info["frame_indices"]
    picks = picks_of(probe, stride=1, fps=fps)
    nearest = [picks.at(number, taken[0]) for number in range(len(taken))]
    believed = info.get("fps")
    if chunks and taken[0] > 0:
        first = next((n for n in range(picks.reachable()) if picks.at(n) >= taken[0]), 0)
        nearest = [picks.at(first + number) for number in range(len(taken))]
    if taken != nearest:
        place = next(
            n for n, (one, other) in enumerate(zip(taken, nearest, strict=True)) if one != other
        )
        return (
            f"at {fps:g} frames a second the frames nearest in time are {_few(nearest, place)}, "
            f"taken were {_few(taken, place)} (as of {believed} frames a second)"
        )
    # A clip that ends early because the file was believed to be faster than it is.
    rate_was_wrong = believed and abs(believed / (probe.fps or believed) - 1) > 0.01
    if rate_was_wrong and len(taken) < most and picks.starts(len(taken) + 1) > taken[0]:
        return (
            f"{len(taken)} frames were taken, as of a video of {believed:g} frames a second; it "
            f"has {probe.fps:g}, which gives more"
        )
    return None


def _few(numbers: Sequence[int], place: int) -> str:
    """Some of them, up to a little behind a place."""
    first, last = max(0, place - 3), place + 3
    shown = ", ".join(map(str, numbers[first:last]))
    return f"{'… ' if first else ''}{shown}{' …' if last < len(numbers) else ''}"


def _open_gop(packets: Sequence[StoredPacket]) -> bool:
    """Whether frames that are decoded after a key frame are shown before it."""
    latest_key = None
    for packet in packets:
        if packet.key:
            latest_key = packet.pts
        elif latest_key is not None and packet.pts is not None and packet.pts < latest_key:
            return True
    return False
