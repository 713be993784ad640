"""Clips to files that people open: mp4 and contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Clip = npt.NDArray[np.uint8]
"""(F, H, W, 3) RGB."""

_MARGIN, _LABEL_HEIGHT, _MIN_TILE = 4, 16, 96


def write_mp4(path: Path, clip: Clip, fps: int) -> None:
    """H.264, good quality, playable everywhere (odd sides are padded to even ones)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = clip.shape
    padded = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer = imageio_ffmpeg.write_frames(
        str(path),
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


def contact_sheet(rows: Sequence[tuple[str, Clip]], *, columns: int = 6) -> Image.Image:
    """One labelled row a clip, `columns` frames spread from its first to its last."""
    tallest = max(clip.shape[1] for _, clip in rows)
    zoom = max(1, -(-_MIN_TILE // tallest))  # tiny toy frames are enlarged, real ones are not
    tile_width = max(clip.shape[2] for _, clip in rows) * zoom
    row_height = tallest * zoom + _LABEL_HEIGHT + _MARGIN
    sheet = Image.new(
        "RGB", (columns * (tile_width + _MARGIN) + _MARGIN, len(rows) * row_height), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, (label, clip) in enumerate(rows):
        top = number * row_height
        draw.text((_MARGIN, top + 2), label, fill="black")
        for column, index in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            frame = Image.fromarray(clip[index])
            tile = frame.resize((frame.width * zoom, frame.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (_MARGIN + column * (tile_width + _MARGIN), top + _LABEL_HEIGHT))
    return sheet
