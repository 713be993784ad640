"""Contact sheets: clips as one image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from shared.io.mp4 import Clip

_MARGIN, _LABEL_HEIGHT, _MIN_TILE = 4, 16, 96


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
