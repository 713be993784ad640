"""Opening media: what a file holds, and its frames as uint8 RGB. Sole user of decord and PIL.open.

A file is read as people see it: upright (EXIF orientation, display matrix), with square pixels,
transparency on white, every frame of an animation composed. What cannot be shown in 8-bit RGB
without a choice that belongs to the user (HDR, video with alpha, float pixels) is refused with the
command that converts it. `docs/inputs.md` states each case.

Whatever is wrong with a file ends as a MediaError whose text names the file.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from shared.errors import UserError

Frame = npt.NDArray[np.uint8]
"""(H, W, 3), RGB, 0..255."""

# What 8-bit RGB can hold without a choice that we should not make for the user.
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}
_SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}

# Formats that hold stills as well as animations. PIL reads both: decord's FFmpeg knows no animated
# WebP, and does not compose a GIF's frames on white.
ANIMATIONS = (".gif", ".webp", ".apng", ".png")
_ANIMATION = re.compile(rb"GIF8|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)
_BROWSER_DELAY_MS = 100  # what browsers show where a frame's delay is missing or too short
_SHORTEST_DELAY_MS = 20

# What ffmpeg writes on stderr about the first video stream.
_VIDEO_LINE = re.compile(r"^\s*Stream #0:\d+.*?: Video: (?P<about>.*)$", re.MULTILINE)
_SAMPLE_ASPECT = re.compile(r"\bSAR (\d+):(\d+)")
_ROTATION = re.compile(r"display ?matrix: rotation of (-?\d+(?:\.\d+)?) degrees", re.IGNORECASE)
_ALPHA = re.compile(r"\b(?:yuva\d+p\w*|rgba\w*|bgra\w*|argb|abgr|gbrap\w*|ya8|ya16\w*)\b")
_ALPHA_TAG = re.compile(r"^\s*alpha_mode\s*:\s*1\s*$", re.MULTILINE | re.IGNORECASE)
_HDR = re.compile(r"\b(smpte2084|arib-std-b67)\b")
_HEADER_SECONDS = 60


Kind = Literal["video", "image", "auto", "text"]
"""What a file is to be read as; auto: one of `ANIMATIONS`, a video if it moves; text: no file."""


class MediaError(Exception):
    """A file that cannot be used. The text names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file holds, as it will be seen (after the image's EXIF rotation)."""

    frames: int
    height: int
    width: int
    fps: float | None
    """None for an image."""

    @property
    def type(self) -> Literal["video", "image"]:
        return "image" if self.fps is None else "video"


def probe(path: Path, kind: Kind) -> Probe:
    """Read what is needed to choose frames and a bucket. Raises MediaError."""
    if kind == "auto":
        with _named_failures(path, "image"), _open_image(path) as image:
            kind = "video" if getattr(image, "n_frames", 1) > 1 else "image"
    if kind == "image":
        with _named_failures(path, "image"), _open_image(path) as image:
            width, height = image.size
            # Orientations 5 to 8 lie on their side.
            if image.getexif().get(0x0112, 1) >= 5:
                width, height = height, width
        return Probe(frames=1, height=height, width=width, fps=None)
    with _named_failures(path, "video"):
        if _is_animation(path):
            with _open_image(path) as image:
                width, height = image.size
                count = getattr(image, "n_frames", 1)
                fps = _animation_fps(image, count)
            return Probe(frames=count, height=height, width=width, fps=fps)
        video = _open_video(path)
        if len(video) == 0:
            raise MediaError(f"{path}: the video has no frames")
        height, width, _ = _rgb(video[0].asnumpy(), path).shape
        width, height = _displayed(width, height, _pixel_aspect(path))
        return Probe(frames=len(video), height=height, width=width, fps=float(video.get_avg_fps()))


def read_frames(
    path: Path, kind: Literal["video", "image"], indices: Sequence[int]
) -> Iterator[Frame]:
    """The frames at `indices` (ascending), one at a time: a long 4K clip need not fit in memory.

    Raises MediaError, at the first frame that cannot be read.
    """
    if kind == "image":
        with _named_failures(path, "image"), _open_image(path) as image:
            frame = np.asarray(_on_white(ImageOps.exif_transpose(image)))
        yield frame
        return
    with _named_failures(path, "video"):
        animation = _open_image(path) if _is_animation(path) else None
    if animation is not None:
        with animation:
            for index in indices:
                with _named_failures(path, f"frame {index}"):
                    animation.seek(index)
                    frame = np.asarray(_on_white(animation))
                yield frame
        return
    with _named_failures(path, "video"):
        video = _open_video(path)
        aspect = _pixel_aspect(path)
    for index in indices:
        with _named_failures(path, f"frame {index}"):
            frame = _rgb(video[index].asnumpy(), path)
            size = _displayed(frame.shape[1], frame.shape[0], aspect)
            if size != (frame.shape[1], frame.shape[0]):
                stretched = Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)
                frame = np.asarray(stretched)
        yield frame


def _on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB. What is transparent shows white, not the colour that happens to lie beneath."""
    if image.mode in _SIXTEEN_BIT_MODES:  # the high byte, as PIL reads 16-bit RGB
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _is_animation(path: Path) -> bool:
    """By its first bytes: what is read may have no name."""
    with path.open("rb") as stream:
        return _ANIMATION.match(stream.read(12)) is not None


def _animation_fps(image: Image.Image, frames: int) -> float:
    """Frames over the seconds that they are shown, with browsers' rule for delays too short."""
    shown = 0.0
    for number in range(frames):
        image.seek(number)
        delay = float(image.info.get("duration", 0) or 0)
        shown += delay if delay >= _SHORTEST_DELAY_MS else _BROWSER_DELAY_MS
    return 1000 * frames / shown


def _displayed(width: int, height: int, aspect: float) -> tuple[int, int]:
    """(width, height) in square pixels: the side that is stretched grows, no detail is lost."""
    if aspect >= 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def _pixel_aspect(path: Path) -> float:
    """Width over height of one pixel as displayed. MediaError for video that 8-bit RGB can't hold.

    decord tells nothing of this, so the header is read by ffmpeg.
    """
    said = _header(path)
    stream = _VIDEO_LINE.search(said)
    if stream is None:
        return 1.0
    about = stream["about"]
    if hdr := _HDR.search(about):
        raise MediaError(
            f"{path}: the video is HDR ({hdr[1]}), which 8-bit RGB would show washed out. Convert "
            "it: ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,zscale=t=bt709:m=bt709:"
            "p=bt709:r=tv,format=yuv420p OUT.mp4"
        )
    if _ALPHA.search(about) or _ALPHA_TAG.search(said[stream.end() :]):
        raise MediaError(
            f"{path}: the video has an alpha channel, and what lies beneath it is not meant to be "
            "seen. Put it on a background: ffmpeg -i IN -filter_complex "
            '"[0]split[a][b];[a]drawbox=c=white:t=fill:replace=1[w];[w][b]overlay" OUT.mp4'
        )
    found = _SAMPLE_ASPECT.search(about)
    if found is None or "0" in found.groups():
        return 1.0
    aspect = int(found[1]) / int(found[2])
    turned = _ROTATION.search(said[stream.end() :])
    if turned and round(float(turned[1])) % 180 == 90:  # decord gives upright frames
        aspect = 1 / aspect
    return aspect


def _rgb(frame: Frame, path: Path) -> Frame:
    """(H, W, 3). Of very narrow videos decord returns lines of another stride as channels."""
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise MediaError(f"{path}: decord reads frames of shape {frame.shape}, expected (H, W, 3)")
    return frame


@contextmanager
def _named_failures(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a MediaError that names the file."""
    try:
        yield
    except (MediaError, UserError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{path}: there is no such file") from error
    except Exception as error:  # decoders raise RuntimeError, DECORDError, OSError, SyntaxError …
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{path}: the file is empty (0 bytes)") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MediaError(f"{path}: cannot decode the {what} ({reason})") from error


def _open_image(path: Path) -> Image.Image:
    image = Image.open(path)
    if image.mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES:
        image.close()
        raise MediaError(
            f"{path}: pixels of mode {image.mode} (32 bits or floats) have no fixed range; convert "
            "the image to 8 bits"
        )
    return image


def _header(path: Path) -> str:
    """What ffmpeg says about a file's streams."""
    import imageio_ffmpeg

    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    # Only local files: a playlist that calls itself .mp4 must not reach the network.
    command = [ffmpeg, "-hide_banner", "-nostdin", "-protocol_whitelist", "file"]
    said = subprocess.run(
        [*command, "-i", f"file:{path}"],
        capture_output=True,
        timeout=_HEADER_SECONDS,
        check=False,  # it always complains that no output was asked for
    )
    return said.stderr.decode(errors="replace")


def _open_video(path: Path) -> Any:
    """A decord reader, one decoding thread: the clips of several files are decoded side by side."""
    try:
        import decord
    except ImportError as error:
        raise UserError(
            "decord, which reads videos, is not installed (there is no wheel for ARM Linux). "
            "Encode on an x86-64 machine; the shards can be trained on anywhere."
        ) from error
    if not path.exists():
        raise FileNotFoundError(path)
    decord.logging.set_level(decord.logging.QUIET)
    try:
        return decord.VideoReader(str(path), num_threads=1)
    except decord.DECORDError as error:
        if "cannot find video stream" not in str(error):
            raise
        stream = _VIDEO_LINE.search(_header(path))
        if stream is None:
            raise MediaError(f"{path}: the file has no video stream") from error
        codec = stream["about"].split()[0].strip(",")
        raise MediaError(
            f"{path}: decord cannot read {codec} video. Convert it: ffmpeg -i IN -c:v libx264 "
            "-crf 12 OUT.mp4"
        ) from error
