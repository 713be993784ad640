"""Clips to mp4 files that people open."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

Clip = npt.NDArray[np.uint8]
"""(F, H, W, 3) RGB."""


def write_mp4(path: Path, clip: Clip, fps: float) -> None:
    """H.264, good quality, playable everywhere (odd sides are padded to even ones)."""
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
        output_params=["-crf", "16"],
    )
    writer.send(None)
    for frame in padded:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
