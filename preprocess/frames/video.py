"""Video files through FFmpeg (PyAV): what is shown, in order, from the first frame on.

The truth about a video is sequential decoding in output order. Containers lie about counts, times
and key frames, and a seek lands where they say; so frames are counted as they come out of the
decoder. Sole user of PyAV for reading.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from preprocess.frames import decord_pairs, hdr
from preprocess.frames.first_rule import Stored, misread
from preprocess.frames.media_info import Frame, KeyFrames, MediaError, Probe, Shortcut
from preprocess.frames.orientation import UPRIGHT, Orientation, of_display_matrix
from preprocess.frames.timing import rate_and_times

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideData

# Frames before this one are reached from the start of the file; seeking would gain little.
_SEEK_FROM = 250
# Seconds before a key frame to which a seek may have to go: program streams have no index.
_SEEK_BEFORE = (0, 2)
# Frames that a codec may show before one that is stored earlier.
_MOST_REORDERED = 16
# Containers without a list of their streams, by FFmpeg's names; bytes and microseconds to look at.
# (PyAV can handle new streams of a transport stream.)
_STREAMS_COME_LATE = ("mpeg",)
_MOST_PROBED = (1 << 31) - 1
# Every so many rows enter a frame's digest: at least one of each 4×4 block that a codec knows.
_DIGEST_ROWS = 4
# FFmpeg's own decoders of these leave the alpha out.
_ALPHA_DECODERS = {"vp8": "-c:v libvpx ", "vp9": "-c:v libvpx-vp9 "}
# Dolby Vision without a picture that others can show.
_DOLBY_TAGS = ("dvhe", "dvh1", "dva1", "dvav", "dav1")

INTERLACED = (
    "interlaced, both fields are taken as one frame (combing artifacts in motion; "
    "to deinterlace: ffmpeg -i IN -vf bwdif=mode=send_frame OUT.mp4)"
)


@dataclass(frozen=True)
class _Video:
    """A local file that is open at its video stream."""

    path: Path
    container: InputContainer
    stream: VideoStream
    on_progress: Callable[[], None]
    """Called after every frame that is decoded."""

    def frames(
        self, *, stored: Stored | None = None, orientation: Orientation = UPRIGHT
    ) -> "Iterator[_Decoded]":
        """What the decoder shows, in order; `orientation` holds until a frame has another.

        What can't be decoded before the first frame (a broadcast that was joined in the middle) or
        after the last (a truncated recording) shows nothing in a player, too; between them it would
        be a wrong frame: MediaError.
        """
        number = 0
        first: av.error.InvalidDataError | None = None
        damage: av.error.InvalidDataError | None = None
        for packet in self.container.demux(self.stream):
            if stored is not None and packet.size:
                stored.note_packet(packet)
            try:
                frames = packet.decode()
            except av.error.InvalidDataError as error:
                first = first or error
                damage = error if number else None
                continue
            if damage is not None and packet.size:  # at the end only what waited comes out
                raise MediaError(
                    f"{self.path}: cannot decode the video after frame {number - 1} "
                    f"({damage.strerror}). {_what_helps(number)}"
                )
            for frame in frames:
                own = _orientation(self.path, frame)
                orientation = own or orientation
                self.on_progress()
                yield _Decoded(frame, orientation, own is not None)
                number += 1
        if number == 0:
            why = (
                f"cannot decode the video ({first.strerror})"
                if first
                else "the video has no frames"
            )
            raise MediaError(f"{self.path}: {why}")


class _Decoded(NamedTuple):
    """A frame as the decoder puts it out."""

    frame: VideoFrame
    orientation: Orientation
    own: bool
    """Whether the orientation came with this frame; else it is that of the frame before."""


def survey(path: Path, on_progress: Callable[[], None] = lambda: None) -> Probe:
    """Decode a video from start to end; what it shows. Raises MediaError, and what PyAV raises.

    `on_progress` is called after every frame.
    """
    with _opened(path, on_progress) as video:
        stream = video.stream
        _refuse_choices(path, stream)
        stored = Stored(
            container=video.container.format.name,
            codec=stream.codec_context.name,
            streams=len(video.container.streams.video),
            aspects_differ=_aspects_differ(stream),
            rotate_tag=_tags(stream).get("rotate", "0").strip() not in ("", "0"),
        )
        pts: list[int | None] = []
        digests: list[int] = []
        damaged: list[int] = []
        interlaced = False
        first: _Decoded | None = None
        for decoded in video.frames(stored=stored):
            frame = decoded.frame
            if first is None:
                first = decoded
                _refuse_hdr(path, frame)
            stored.note_frame(frame, decoded.orientation, own=decoded.own)
            interlaced = interlaced or bool(frame.interlaced_frame)
            if frame.is_corrupt:
                damaged.append(len(pts))
            if len(pts) >= _SEEK_FROM:
                digests.append(_digest(frame))
            pts.append(frame.pts)
        assert first is not None, "frames() raises where there are none"
        assert stream.time_base is not None
        if stored.packets[-1].partial:  # not every decoder marks what it makes of one
            damaged += _from_partial(stored.packets[-1].pts, pts)
        _refuse_lost(path, stored, pts)
        count = _without_damage(path, len(pts), damaged)
        claimed = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        shown = (packet for packet in stored.packets if not packet.discarded)
        dts = (packet.dts for packet in shown if packet.dts is not None)
        fps, times = rate_and_times(pts, dts, stream.time_base, claimed)
        size = first.frame.width, first.frame.height
        width, height = _shown_size(*size, stream, first.orientation)
        return Probe(
            frames=count,
            height=height,
            width=width,
            fps=fps or 1.0,  # of one frame that names no rate
            times=None if times is None else times[:count].tobytes(),
            old_reading=misread(stored, pts[:count]),
            notes=(INTERLACED,) if interlaced else (),
            key_frames=_key_frames(stored, pts[:count], digests),
        )


def _from_partial(time: int | None, pts: Sequence[int | None]) -> range:
    """The last frames, from that on which was made of the packet of this time; empty: none was."""
    for number in range(len(pts) - 1, max(-1, len(pts) - _MOST_REORDERED), -1):
        if time is not None and pts[number] == time:
            return range(number, len(pts))
    return range(0)


def _refuse_lost(path: Path, stored: Stored, pts: Sequence[int | None]) -> None:
    """MediaError if a packet in the middle decoded to no frame: it is damaged.

    Of H.264 and HEVC each packet between the first and the last that are shown gives one.
    """
    times = {time for time in pts if time is not None}
    if stored.codec not in ("h264", "hevc") or None in pts or len(times) < len(pts):
        return
    first, last = min(times), max(times)
    for packet in stored.packets:
        time = packet.pts
        if time is None or packet.discarded or time in times or not first < time < last:
            continue
        number = sum(shown < time for shown in times)
        raise MediaError(
            f"{path}: the frame after frame {number - 1} of the video is lost: its packet decodes "
            f"to nothing. {_what_helps(number)}"
        )


def _without_damage(path: Path, count: int, damaged: Sequence[int]) -> int:
    """How many of `count` frames there are, but for damaged ones at the end.

    A truncated file ends in one, a broadcast that was joined in the middle may begin with
    some. Between them, frames before and behind lean on a damaged one without being marked:
    MediaError.
    """
    bad = set(damaged)
    intact = [number for number in range(count) if number not in bad] if bad else range(count)
    if not intact:
        raise MediaError(f"{path}: every frame of the video is damaged")
    inside = [number for number in damaged if intact[0] < number < intact[-1]]
    if inside:
        raise MediaError(
            f"{path}: frame {inside[0]} of the video is damaged, and others are made of it. "
            f"{_what_helps(inside[0])}"
        )
    return intact[-1] + 1


def _what_helps(number: int) -> str:
    """With a video that is damaged at the frame of that number: those before may lean on it."""
    intact = number - _MOST_REORDERED
    if intact <= 0:
        return "Fetch the file again"
    return (
        f"Fetch the file again, or keep what lies before: ffmpeg -i IN -frames:v {intact} OUT.mp4"
    )


def frames_at(
    path: Path,
    indices: Sequence[int],
    shortcut: Shortcut | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """The frames at `indices` (ascending, repeated ones allowed): (H, W, 3) uint8 RGB each.

    Raises MediaError where the video has fewer, or one is damaged, and what PyAV raises.
    """
    done = 0
    ways = [_in_order]
    if shortcut is not None:
        ways.insert(0, partial(_by_shortcut, shortcut=shortcut))
    if decord_pairs.is_avi(path):
        ways.insert(0, _by_decord)
    for way in ways:
        if way is not _in_order and done:
            continue  # what one way has begun is ended in order
        with _opened(path, on_progress) as video:
            for frame in way(video, indices[done:]):
                yield frame
                done += 1
        if done == len(indices):
            return


def _in_order(video: _Video, indices: Sequence[int]) -> Iterator[Frame]:
    """The frames at `indices`, from the first frame of the file on. Raises MediaError."""
    picture = _Picture(video.stream)
    done = 0
    for place, times, decoded in _taken(enumerate(video.frames()), indices):
        if decoded.frame.is_corrupt:
            raise MediaError(f"{video.path}: frame {indices[place]} is damaged")
        yield from repeat(picture.of(decoded), times)
        done = place + times
    if done < len(indices):
        raise MediaError(f"{video.path}: the video ends before frame {indices[done]}")


def _by_decord(video: _Video, indices: Sequence[int]) -> Iterator[Frame]:
    """The frames at `indices` of an AVI as far as decord reads them: none but in its pairs."""
    context = video.stream.codec_context
    layout = (context.pix_fmt or "", context.width, context.height)
    if not decord_pairs.reads(video.container.format.name, context.name, *layout):
        return
    picture = _Picture(video.stream)
    for rgb in decord_pairs.frames(video.path, indices):
        video.on_progress()
        yield picture.shown(rgb, UPRIGHT)  # an AVI cannot be turned


def _by_shortcut(video: _Video, indices: Sequence[int], *, shortcut: Shortcut) -> Iterator[Frame]:
    """The frames at `indices` from a seek on, as long as they are those of sequential decoding."""
    picture = _Picture(video.stream)
    numbered = enumerate(_from_key_frame(video, shortcut), shortcut.frame)
    try:
        for place, times, decoded in _taken(numbered, indices):
            # The first digest is the key frame's.
            if _digest(decoded.frame) != shortcut.digests[1 + place]:
                return
            yield from repeat(picture.of(decoded), times)
    except (MediaError, av.error.FFmpegError):  # from the start it may go well
        return


def _taken(
    numbered: Iterable[tuple[int, _Decoded]], indices: Sequence[int]
) -> Iterator[tuple[int, int, _Decoded]]:
    """(its place in `indices`, how often it stands there, frame) of each that does, to the last."""
    place = 0
    for number, decoded in numbered:
        if times := indices[place:].count(number):
            yield place, times, decoded
            place += times
            if place == len(indices):
                return


def _from_key_frame(video: _Video, shortcut: Shortcut) -> Iterator[_Decoded]:
    """What the decoder shows from the shortcut's key frame on; nothing if no seek leads there."""
    assert video.stream.time_base is not None
    for seconds in _SEEK_BEFORE:
        before = round(seconds / video.stream.time_base)
        video.container.seek(shortcut.pts - before, stream=video.stream)
        # Frames that need what lies before the seek come first, damaged, or are missing.
        frames = video.frames(orientation=shortcut.orientation)
        for decoded in frames:
            pts = decoded.frame.pts
            if pts == shortcut.pts and _digest(decoded.frame) == shortcut.digests[0]:
                yield from chain([decoded], frames)
                return
            if pts is not None and pts > shortcut.pts:
                break


@contextmanager
def _opened(path: Path, on_progress: Callable[[], None]) -> Iterator[_Video]:
    """A local file and its video stream, for one thread: several files are decoded side by side."""
    # Only local files: a playlist that calls itself .mp4 must not reach the network. And only this
    # one: 1%03d.jpg is a name, no pattern of others.
    options = {"protocol_whitelist": "file", "pattern_type": "none"}
    url = f"file:{path}"  # or a colon in the name ends a protocol's
    with ExitStack() as held:
        container = held.enter_context(av.open(url, options=options))
        if container.format.name in _STREAMS_COME_LATE:
            # PyAV fails where a stream begins that it has not seen: it is to look at all of it.
            options |= {"probesize": str(_MOST_PROBED), "analyzeduration": str(_MOST_PROBED)}
            container = held.enter_context(av.open(url, options=options))
        stream = container.streams.best("video")
        attached = av.stream.Disposition.attached_pic  # the cover of an album
        if not isinstance(stream, VideoStream) or stream.disposition & attached:
            raise MediaError(f"{path}: the file has no video stream")
        if stream.codec_context is None:
            raise MediaError(
                f"{path}: this FFmpeg has no decoder for its video. Convert the file with a "
                "program that plays it"
            )
        stream.codec_context.thread_count = 1
        yield _Video(path, container, stream, on_progress)


class _Picture:
    """Frames of one stream as they are shown: RGB, upright, square pixels."""

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self._graph: Graph | None = None
        self._of: tuple[Any, ...] = ()

    def of(self, decoded: _Decoded) -> Frame:
        """(H, W, 3) uint8, from what the decoder gave."""
        return self.shown(self._rgb(decoded.frame), decoded.orientation)

    def shown(self, rgb: Frame, orientation: Orientation) -> Frame:
        """The same, from RGB as stored."""
        size = _shown_size(rgb.shape[1], rgb.shape[0], self._stream, orientation)
        rgb = orientation.apply(rgb)
        if size != (rgb.shape[1], rgb.shape[0]):
            stretched = Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR)
            rgb = np.asarray(stretched)
        return rgb

    def _rgb(self, frame: VideoFrame) -> Frame:
        """By FFmpeg's scale filter at its defaults, as the ffmpeg program and decord convert."""
        layout = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if self._graph is None or layout != self._of:
            graph = Graph()
            graph.threads = 1
            graph.link_nodes(
                graph.add_buffer(
                    width=frame.width,
                    height=frame.height,
                    format=frame.format,
                    time_base=self._stream.time_base or Fraction(1, 1000),
                ),
                graph.add("scale"),
                graph.add("format", "pix_fmts=rgb24"),
                graph.add("buffersink"),
            ).configure()
            self._graph, self._of = graph, layout
        self._graph.vpush(frame)
        return np.asarray(self._graph.vpull().to_ndarray(), np.uint8)


def _orientation(path: Path, frame: VideoFrame) -> Orientation | None:
    """What a frame says of itself: by the container, or by the pictures (H.264's SEI)."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV stops at side data that it has no name for, such as EXIF
        matrix = None
        if frame.rotation % 360:
            raise MediaError(
                f"{path}: the video is to be shown rotated by {frame.rotation} degrees or "
                "mirrored, and which of the two cannot be read. Rotate its frames: ffmpeg -i IN "
                "OUT.mp4"
            ) from None
    if matrix is None:
        return None
    try:
        return of_display_matrix(bytes(cast("SideData", matrix)))
    except ValueError as error:
        raise MediaError(f"{path}: {error}") from error


def _shown_size(
    width: int, height: int, stream: VideoStream, orientation: Orientation
) -> tuple[int, int]:
    """(width, height) upright, in square pixels, of stored ones: the side that is short grows."""
    aspect = float(stream.sample_aspect_ratio or 1)  # the container's, else the codec's
    width, height = orientation.size(width, height)
    if orientation.transposed:
        aspect = 1 / aspect
    if aspect >= 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def _tags(stream: VideoStream) -> dict[str, str]:
    """By their names in small letters: containers write them either way."""
    return {name.lower(): value for name, value in stream.metadata.items()}


def _aspects_differ(stream: VideoStream) -> bool:
    """Whether container and codec disagree about the shape of a pixel."""
    own = stream.codec_context.sample_aspect_ratio
    return bool(own) and bool(stream.sample_aspect_ratio) and own != stream.sample_aspect_ratio


def _refuse_choices(path: Path, stream: VideoStream) -> None:
    """MediaError for video that 8-bit RGB can't hold without a choice of the user."""
    context = stream.codec_context
    if context.codec_tag in _DOLBY_TAGS and context.color_trc not in hdr.CURVES:
        raise MediaError(
            f"{path}: the video is Dolby Vision ({context.codec_tag}) without a picture for "
            "others: its colours would be wrong. Export it as SDR (BT.709) from its editor"
        )
    _refuse_hdr(path, context)
    has_alpha = context.format is not None and any(
        part.is_alpha for part in context.format.components
    )
    if has_alpha or _tags(stream).get("alpha_mode") == "1":
        decoder = _ALPHA_DECODERS.get(context.name, "")
        raise MediaError(
            f"{path}: the video has an alpha channel, and what lies beneath it is not meant to be "
            f"seen. Put it on a background: ffmpeg {decoder}-i IN -filter_complex "
            '"[0]split[a][b];[a]drawbox=c=white:t=fill:replace=1[w];[w][b]overlay" OUT.mp4'
        )


def _refuse_hdr(path: Path, shown: VideoFrame | VideoCodecContext) -> None:
    transfer, primaries, matrix = (
        int(number or 0) for number in (shown.color_trc, shown.color_primaries, shown.colorspace)
    )
    why = hdr.refusal("video", transfer, primaries, matrix, "OUT.mp4")
    if why is not None:
        raise MediaError(f"{path}: {why}")


def _digest(frame: VideoFrame) -> int:
    """32 bits of the first plane (luma), of every fourth row; not of what pads its rows."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
    layout = frame.format
    if layout.is_planar:
        used = plane.width * ((layout.components[0].bits + 7) // 8)
    else:
        used = plane.width * layout.padded_bits_per_pixel // 8
    return zlib.crc32(np.ascontiguousarray(rows[::_DIGEST_ROWS, :used]))


def _key_frames(
    stored: Stored, pts: Sequence[int | None], digests: Sequence[int]
) -> KeyFrames | None:
    """Places to seek to, of a video long enough that seeking gains something."""
    if not digests or len(stored.orientations) > 1:
        return None
    (orientation,) = stored.orientations
    keys = {packet.pts for packet in stored.packets if packet.key}
    places = tuple(
        (number, time)
        for number, time in enumerate(pts)
        if number >= _SEEK_FROM and time is not None and time in keys
    )
    if not places:
        return None
    return KeyFrames(
        first=_SEEK_FROM,
        digests=np.asarray(digests[: len(pts) - _SEEK_FROM], np.uint32).tobytes(),
        places=places,
        orientation=orientation,
    )
