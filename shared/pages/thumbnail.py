"""Small pictures of samples, that move where the sample does."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from shared.format.cache import CacheIndex, MemberReader
from shared.format.latent_rgb import latents_to_rgb
from shared.format.schema import LATENTS_MEMBER, seconds_of
from shared.pages.html import data_uri
from shared.spread import spread_over

_MOST_FRAMES = 24
_LONG_SIDE = 208  # pixels, about; a latent cell becomes a whole number of them
_SHORTEST_MS = 20  # what browsers still keep to


def thumbnail_of(index: CacheIndex, reader: MemberReader, row: int) -> str | None:
    """A sample of a cache by its latents' colours; None where it or the cache has none.

    Raises UserError for a damaged sample.
    """
    tensors = reader.read(row, LATENTS_MEMBER)
    if tensors is None or index.latent_rgb is None:
        return None
    frames = latents_to_rgb(tensors["latents"], index.latent_rgb)
    return thumbnail(frames, seconds_of(reader.info(row)))


def thumbnail(frames: npt.NDArray[np.uint8], seconds: float | None) -> str:
    """Frames (T, h, w, 3), a pixel a latent cell, as a WebP that moves at the clip's own speed.

    A data URI. `seconds`: of the whole clip; None: not known.
    """
    chosen = frames[spread_over(len(frames), _MOST_FRAMES)]
    count, height, width, _ = chosen.shape
    zoom = max(1, round(_LONG_SIDE / max(height, width)))
    images = [
        Image.fromarray(frame).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
        for frame in chosen
    ]
    each = max(_SHORTEST_MS, round(1000 * (seconds or 1) / count))
    out = io.BytesIO()
    moving = {"save_all": True, "append_images": images[1:], "duration": each, "loop": 0}
    images[0].save(out, "WEBP", quality=82, method=4, **(moving if count > 1 else {}))
    return data_uri("image/webp", out.getvalue())
