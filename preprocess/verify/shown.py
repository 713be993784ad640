"""What a video shows by the ffmpeg program, and whether a decoded sample is of these frames.

The second opinion of `wanprep verify --decode`: another program decodes the whole file, and each
frame of the sample is looked up by its picture. Nothing that chose or read the sample's frames
(`preprocess.frames.video`, `preprocess.frames.picks`) is used.
"""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.frames.media_info import MediaError
from preprocess.media.sources import MediaFile, local_file
from preprocess.media.worker_process import alive
from shared.format.buckets import Bucket

_ALIVE_SECONDS = 5
_LONG_SIDE = 32  # pixels of a thumbnail
_TIME = re.compile(rb"\bn: *\d+ pts:.*?pts_time:(\S+)")
# Levels, root mean square: less than this apart, two thumbnails are the same picture after a VAE.
_SAME = 6.0
# So many times as far from the frame that it should be as from another, it is the other.
_NEARER = 2.0
_EQUALLY_NEAR = 0.002  # seconds; Matroska rounds to one thousandth

Thumbnails = npt.NDArray[np.uint8]
"""(F, h, w) grey."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Every frame that a video shows, in order."""

    thumbnails: Thumbnails
    seconds: npt.NDArray[np.float64]
    """When each is shown, from any zero; NaN where ffmpeg knows no time."""


def shown_by_ffmpeg(media_file: MediaFile, bucket: Bucket) -> Shown:
    """Every frame of a video, covered and cropped to the bucket's shape. Raises MediaError."""
    import imageio_ffmpeg

    height, width = thumbnail_size(bucket)
    square = "scale='if(gte(sar,1),iw*sar,iw)':'if(gte(sar,1),ih,ih/sar)',setsar=1"
    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area"
    filters = f"showinfo=checksum=0,{square},{cover},crop={width}:{height},format=gray"
    with local_file(media_file, on_progress=alive) as path:
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-threads", "1"),
            # Only local files: a playlist that calls itself .mp4 must not reach the network.
            *("-protocol_whitelist", "file", "-i", f"file:{path}", "-an", "-sn", "-dn"),
            *("-vf", filters, "-fps_mode", "passthrough"),
            *("-f", "rawvideo", "-pix_fmt", "gray", "pipe:1"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            while True:
                try:
                    stdout, stderr = running.communicate(timeout=_ALIVE_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    alive()  # a long film takes long
    pictures = np.frombuffer(stdout, np.uint8)
    if running.returncode or not len(pictures):
        why = stderr.decode(errors="replace").strip().splitlines() or ["no frames"]
        raise MediaError(f"{media_file}: ffmpeg cannot decode it ({why[-1]})")
    thumbnails = pictures.reshape(-1, height, width)
    times = _TIME.findall(stderr)[: len(thumbnails)]
    seconds = [np.nan if time == b"NOPTS" else float(time) for time in times]
    seconds += [np.nan] * (len(thumbnails) - len(seconds))
    return Shown(thumbnails=thumbnails, seconds=np.asarray(seconds))


def thumbnail_size(bucket: Bucket) -> tuple[int, int]:
    """(height, width) of thumbnails of a bucket."""
    scale = _LONG_SIDE / max(bucket.height, bucket.width)
    return max(1, round(bucket.height * scale)), max(1, round(bucket.width * scale))


def other_frames(
    frames: npt.NDArray[np.uint8], shown: Shown, info: Mapping[str, Any], media: Mapping[str, Any]
) -> str | None:
    """Which of a sample's decoded frames, (F, H, W, 3), are not those that it should have.

    None where all are. `info` is its `KEY.json`, `media` that group of the cache's fingerprint:
    stride or frame rate and the first frame say which frames it should have.
    """
    wanted = _wanted(info, shown, media)
    if wanted[-1] >= len(shown.thumbnails):
        return (
            f"it should reach frame {wanted[-1]} of the source, which shows "
            f"{len(shown.thumbnails)} frames"
        )
    height, width = shown.thumbnails.shape[1:]
    source = shown.thumbnails.reshape(len(shown.thumbnails), -1).astype(np.float32)
    wrong = []
    for number, (frame, should) in enumerate(zip(frames, wanted, strict=True)):
        small = Image.fromarray(frame).convert("L").resize((width, height), Image.Resampling.BOX)
        off = source - np.asarray(small, np.float32).reshape(-1)
        off = np.sqrt(np.square(off).mean(axis=1))
        looks = int(off.argmin())
        if off[should] > max(_SAME, _NEARER * off[looks]):
            wrong.append((number, looks, should))
    if not wrong:
        return None
    number, looks, should = wrong[0]
    return (
        f"{len(wrong)} of {len(frames)} frames are other frames of the source: frame {number} "
        f"looks like its frame {looks}, expected {should}"
    )


def _wanted(info: Mapping[str, Any], shown: Shown, media: Mapping[str, Any]) -> Sequence[int]:
    """Numbers of the frames that a sample should have, by its first one and the settings."""
    taken: list[int] = info["frame_indices"]
    stride, fps = media.get("video_sample_stride"), media.get("fps")
    if isinstance(stride, int):
        return [taken[0] + number * stride for number in range(len(taken))]
    seconds = shown.seconds
    if (
        isinstance(fps, int | float)
        and media.get("clips") != "chunk"  # whose times go on from clip to clip
        and taken[0] < len(seconds)
        and np.isfinite(seconds).all()
        and (np.diff(seconds) > 0).all()
    ):
        times = seconds[taken[0]] + np.arange(len(taken)) / fps
        off = np.abs(seconds[:, None] - times[None])
        nearest = off.min(axis=0)
        # Of frames equally near either may be taken: then the sample's own is as good.
        equally = [
            own < len(seconds) and off[own, n] <= nearest[n] + _EQUALLY_NEAR
            for n, own in enumerate(taken)
        ]
        return [
            own if fine else int(off[:, n].argmin())
            for n, (own, fine) in enumerate(zip(taken, equally, strict=True))
        ]
    return taken
