"""Image files through PIL, as viewers show them: upright, on white, 8-bit RGB. Alone opens them.

PIL's own limits refuse sound files; those here are what a worker can hold. They are PIL's globals,
so they are set where files are opened, and nowhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

MOST_PIXELS = 1 << 29
"""32768 × 16384; as RGB 1.6 GB, more while it is resized. PIL takes a third of it."""
_MOST_TEXT_BYTES = 1 << 28
"""Of a PNG's texts, unpacked: ComfyUI's workflow may have more than PIL's 1 MB."""

# What 8-bit RGB can hold without a choice that we should not make for the user.
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}
_SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}

Image.MAX_IMAGE_PIXELS = None  # it is MOST_PIXELS that counts
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MOST_TEXT_BYTES


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, its pixels not yet read. Raises ValueError for what `shown` can't show, and
    what PIL raises."""
    with Image.open(path) as image:
        if image.mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES:
            raise ValueError(
                f"pixels of mode {image.mode} (32 bits or floats) have no fixed range; convert the "
                "image to 8 bits"
            )
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} pixels are too many, expected at most "
                f"{MOST_PIXELS >> 20} Mi; make it smaller"
            )
        yield image


def shown(image: Image.Image) -> Image.Image:
    """The frame that an image file is at: upright, 8-bit RGB, transparency on white."""
    image.load()  # TIFFs turn upright here; PNGs may have their orientation after the pixels
    return _on_white(ImageOps.exif_transpose(image))


def is_transparent(image: Image.Image) -> bool:
    """Whether some of the frame's pixels are, at least in part."""
    if not image.has_transparency_data:
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB. What is transparent shows white, not the colour that happens to lie beneath."""
    if image.mode in _SIXTEEN_BIT_MODES:  # the high byte, as PIL reads 16-bit RGB
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
