"""The reader of pictures reads what is there, and nothing that is not."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.field.picture import (
    NUMBERS,
    ORIENTATIONS,
    Seen,
    UnreadableError,
    error_of,
    number_of,
    picture,
    see,
    turned,
)


@pytest.mark.parametrize("size", [(96, 64), (97, 61), (48, 32), (192, 64), (96, 128)])
def test_every_number_in_every_orientation_is_itself_alone(size: tuple[int, int]) -> None:
    numbers = range(NUMBERS) if size == (96, 64) else (0, 1, 77, 255)
    for number in numbers:
        for orientation in ORIENTATIONS:
            lying = turned(picture(number, size), orientation)
            assert see(lying.astype(np.uint8)) == Seen(number, orientation)


def test_orientations_are_exifs() -> None:
    """PIL undoes with its own table what we made with ours."""
    from PIL import ImageOps

    for orientation in ORIENTATIONS:
        stored = Image.fromarray(turned(picture(77), orientation).astype(np.uint8))
        exif = stored.getexif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        stored.save(file, "png", exif=exif)
        assert number_of(np.asarray(ImageOps.exif_transpose(Image.open(file)))) == 77


def test_a_lossy_codec_leaves_it_legible() -> None:
    file = io.BytesIO()
    Image.fromarray(picture(173, (97, 61))).save(file, "jpeg", quality=20)
    assert number_of(np.asarray(Image.open(file))) == 173


def test_what_is_no_picture_is_not_read() -> None:
    one, other = picture(5), picture(10)
    woven = one.copy()
    woven[::2] = other[::2]
    halves = np.concatenate([one[:32], other[32:]])
    blended = ((one.astype(int) + other) // 2).astype(np.uint8)
    washed_out = (one // 3 + 90).astype(np.uint8)
    for wrong in (woven, halves, blended, washed_out, np.full_like(one, 128), np.zeros_like(one)):
        with pytest.raises(UnreadableError):
            see(wrong)
    with pytest.raises(UnreadableError, match="orientation 2"):
        number_of(turned(one, 2).astype(np.uint8))


def test_wrong_colours_are_seen() -> None:
    one = picture(77)
    assert error_of(one) == 0
    full_range_as_limited = np.clip((one.astype(float) - 16) * 255 / 219, 0, 255)
    limited_range_as_full = one * (219 / 255) + 16
    for wrong in (one[:, :, ::-1], full_range_as_limited, limited_range_as_full):
        assert error_of(wrong.astype(np.uint8)) > 5
