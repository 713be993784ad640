"""The numbers of the design brief, section 3, and what holds for all sizes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.format.buckets import (
    BASE_BUCKETS,
    Bucket,
    bucket_size,
    nearest_base,
)
from shared.format.resize import centre_crop, cover_size

SIDES = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        (640, 16, (480, 832)),
        (640, 32, (480, 832)),
        (320, 16, (240, 416)),
        (480, 16, (352, 624)),
        (960, 16, (720, 1248)),
        (320, 32, (224, 416)),
        (480, 32, (352, 608)),
        (960, 32, (704, 1248)),
    ],
)
def test_sixteen_to_nine(size: int, multiple: int, expected: tuple[int, int]) -> None:
    assert bucket_size(1080, 1920, size=size, multiple=multiple) == expected
    assert bucket_size(1920, 1080, size=size, multiple=multiple) == expected[::-1]


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ((512, 512), (512, 512)),
        ((100, 1000), (256, 1024)),
        ((1000, 100), (1024, 256)),
        ((272, 640), (320, 768)),
        # 4:3 is exactly between 448/576 and 416/576 in plain distance; the squarer one gets it.
        ((480, 640), (448, 576)),
        ((640, 480), (576, 448)),
    ],
)
def test_nearest_ratio(source: tuple[int, int], base: tuple[int, int]) -> None:
    assert nearest_base(*source) == base


def test_the_table_is_symmetric_and_without_doubles() -> None:
    assert len(set(BASE_BUCKETS)) == len(BASE_BUCKETS) == 41
    assert {(w, h) for h, w in BASE_BUCKETS} == set(BASE_BUCKETS)


@given(height=SIDES, width=SIDES, size=st.integers(32, 2000), multiple=st.sampled_from([16, 32]))
def test_any_source_gets_a_bucket(height: int, width: int, size: int, multiple: int) -> None:
    bucket = bucket_size(height, width, size=size, multiple=multiple)
    assert all(side >= multiple and side % multiple == 0 for side in bucket)
    assert bucket_size(width, height, size=size, multiple=multiple) == bucket[::-1]
    # Never more pixels than the size promises (up to a side's minimum).
    assert math.prod(bucket) <= max(size * size * 1.1, multiple * multiple * 4)


@given(source=st.tuples(SIDES, SIDES), target=st.tuples(SIDES, SIDES))
def test_covering_and_cropping(source: tuple[int, int], target: tuple[int, int]) -> None:
    covered = cover_size(source, target)
    assert covered[0] >= target[0] and covered[1] >= target[1]
    assert covered[0] == target[0] or covered[1] == target[1]
    top, left = centre_crop(covered, target)
    assert 0 <= top <= covered[0] - target[0] and 0 <= left <= covered[1] - target[1]
    below, right = covered[0] - target[0] - top, covered[1] - target[1] - left
    assert 0 <= below - top <= 1 and 0 <= right - left <= 1


def test_latent_shape() -> None:
    assert Bucket(480, 832, 81).latent_shape(16, (4, 8, 8)) == (16, 21, 60, 104)
    assert Bucket(480, 832, 1).latent_shape(48, (4, 16, 16)) == (48, 1, 30, 52)
