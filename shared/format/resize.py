"""The resize rule: cover the target, crop its centre. What it gives is what encoders see."""

from PIL import Image


def cover_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after scaling `source` so that it just covers `target`, ratio kept."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return (
        max(target[0], round(source[0] * scale)),
        max(target[1], round(source[1] * scale)),
    )


def centre_crop(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of the centred `target` window in `source`."""
    return (source[0] - target[0]) // 2, (source[1] - target[1]) // 2


def fit_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """An 8-bit RGB image resized (PIL's bilinear, antialiased) and cropped to height × width."""
    covered = cover_size((image.height, image.width), (height, width))
    top, left = centre_crop(covered, (height, width))
    if covered != (image.height, image.width):
        image = image.resize((covered[1], covered[0]), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + width, top + height))
