"""Clips to mp4 files that people open, and back."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

Clip = npt.NDArray[np.uint8]
"""(F, H, W, 3) RGB."""


def write_mp4(path: Path, clip: Clip, fps: float, *, crf: int = 16) -> None:
    """H.264, good quality, playable everywhere (odd sides are padded to even ones).

    `crf`: of x264, 0 to 51; a higher one is a smaller file.
    """
    import imageio_ffmpeg  # brings an ffmpeg, which training needs for nothing else

    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = clip.shape
    padded = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer = imageio_ffmpeg.write_frames(
        str(path.absolute()),  # ffmpeg reads -name as an option and a: as a protocol
        (padded.shape[2], padded.shape[1]),
        fps=fps,
        codec="libx264",
        macro_block_size=2,
        output_params=["-crf", str(crf)],
    )
    writer.send(None)
    for frame in padded:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def read_mp4(path: Path) -> Clip:
    """Every frame of a video file, for clips such as `write_mp4` writes. OSError if it is none."""
    import imageio_ffmpeg

    try:
        frames = imageio_ffmpeg.read_frames(str(path.absolute()))
        width, height = next(frames)["size"]
        shown = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]
    except (OSError, RuntimeError, StopIteration) as error:  # with ffmpeg's many lines
        raise OSError(f"{path} is no video that ffmpeg can read") from error
    if not shown:
        raise OSError(f"{path} has no frames")
    return np.stack(shown)
