"""The seed document's media parameters: its numbers to the letter, and what always holds."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.dataset.clips import Clip, ClipRule, choose_clips
from preprocess.dataset.sizes import RATIO_CROPS, adapted_weights, budget_frames
from preprocess.frames.media_info import MediaError, Probe
from shared.format.buckets import Bucket

RULE = ClipRule(
    image_size=640,
    video_size=640,
    token_size=640,
    stride=2,
    frames=81,
    seed=42,
    multiple=16,
    temporal_stride=4,
)
MEDIA = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(300)]
LARGE = Probe(frames=2000, height=4000, width=4000, fps=24.0)
PHOTO = Probe(frames=1, height=4000, width=4000, fps=None)


def drawn(probe: Probe, rule: ClipRule) -> list[Clip]:
    """The clips of 300 media of one form."""
    return [clip for sha256 in MEDIA for clip in choose_clips(probe, sha256, rule)]


def shapes(probe: Probe, rule: ClipRule) -> set[str]:
    return {str(clip.bucket) for clip in drawn(probe, rule)}


@pytest.mark.parametrize(
    ("size", "named", "bucket"),
    [(320, "240P", "416x240"), (480, "320P", "624x352"), (640, "480P", "832x480"),
     (960, "720P", "1248x720")],
)  # fmt: skip
def test_all_set_to_one_size_is_what_people_call_it(size: int, named: str, bucket: str) -> None:
    rule = replace(RULE, image_size=size, video_size=size, token_size=size)
    wide = Probe(frames=400, height=1080, width=1920, fps=24.0)
    assert shapes(wide, rule) == {f"{bucket}x81"}
    assert abs(int(named[:-1]) - int(bucket.split("x")[1])) <= 32  # 320P has 352 lines
    # The seed's shell block, which sets both flags below, at its own size and at any other.
    assert shapes(wide, replace(rule, adapt=True, token_budget=True)) == {f"{bucket}x81"}


# What the document says, sentence by sentence: sizes of images, of videos with their frames.
DOCUMENT = {
    "random_hw_adapt, 49 frames, video 1024, image 1024": (
        {"adapt": True, "frames": 49, "video_size": 1024, "image_size": 1024},
        ("512x512", "1024x1024"),
        ("512x512x49", "1024x1024x49"),
    ),
    "random_hw_adapt, 49 frames, video 256, image 1024": (
        {"adapt": True, "frames": 49, "video_size": 256, "image_size": 1024},
        ("256x256", "1024x1024"),
        ("256x256x49", "256x256x49"),
    ),
    "token length, 49 frames, token 1024, video 256, image 1024": (
        {"frames": 49, "token_size": 1024, "video_size": 256, "image_size": 1024},
        ("256x256", "1024x1024"),
        ("256x256x49", "1024x1024x49"),
    ),
    "token length, 49 frames, token 512, video 256, image 1024": (
        {"frames": 49, "token_size": 512, "video_size": 256, "image_size": 1024},
        ("256x256", "1024x1024"),
        ("256x256x49", "1024x1024x9"),
    ),
}


@pytest.mark.parametrize(("settings", "images", "videos"), DOCUMENT.values(), ids=DOCUMENT)
def test_the_documents_ranges(
    settings: dict[str, int], images: tuple[str, str], videos: tuple[str, str]
) -> None:
    rule = replace(RULE, **settings)
    if "token_size" in settings:  # its shell blocks always set both
        rule = replace(rule, adapt=True, token_budget=True)
    buckets = sorted(clip.bucket for clip in drawn(PHOTO, rule))
    assert (str(buckets[0]), str(buckets[-1])) == (f"{images[0]}x1", f"{images[1]}x1")
    buckets = sorted(clip.bucket for clip in drawn(LARGE, rule))
    assert (str(buckets[0]), str(buckets[-1])) == videos


@pytest.mark.parametrize(("size", "frames"), [(512, 49), (768, 21), (1024, 9), (256, 49)])
def test_the_documents_token_budget(size: int, frames: int) -> None:
    assert budget_frames(size, frames=49, token_size=512) == frames
    rule = replace(RULE, frames=49, token_budget=True, token_size=512, video_size=size)
    assert shapes(LARGE, rule) == {f"{size}x{size}x{frames}"}


def test_512_by_512_by_49_has_13312_tokens() -> None:
    _, time, high, wide = Bucket(512, 512, 49).latent_shape(16, (4, 8, 8))
    assert time * (high // 2) * (wide // 2) == 13_312  # the transformer's patches are 1 x 2 x 2


def test_how_often_each_size_is_drawn() -> None:
    rule = replace(RULE, adapt=True, video_size=1024)
    sizes = [clip.bucket.height for clip in drawn(LARGE, rule)]
    assert {size: sizes.count(size) for size in set(sizes)} == pytest.approx(
        {1024: 225, 816: 25, 672: 25, 512: 25}, abs=25
    )
    assert adapted_weights(4) == (9, 1, 1, 1)
    rule = replace(RULE, adapt=True, token_budget=True, video_size=512, image_size=1000)
    sizes = [clip.bucket.height for clip in drawn(LARGE, rule)]
    assert {size: sizes.count(size) for size in set(sizes)} == pytest.approx(
        {512: 60, 640: 60, 768: 60, 896: 60, 992: 60}, abs=30
    )


def test_a_small_video_is_hardly_upscaled_where_a_smaller_size_is_there() -> None:
    rule = replace(RULE, adapt=True, token_budget=True, video_size=256, image_size=1024)
    small = Probe(frames=400, height=360, width=640, fps=24.0)  # mean side 500, so below 625
    sides = {clip.bucket.height for clip in drawn(small, rule)}
    assert sides == {192, 288, 384}  # of 16:9 at 256, 384, 512
    tiny = Probe(frames=400, height=100, width=100, fps=24.0)
    assert {clip.bucket.height for clip in drawn(tiny, rule)} == {256}


def test_off_enable_bucket_gives_squares() -> None:
    wide = Probe(frames=400, height=1080, width=1920, fps=24.0)
    assert shapes(wide, replace(RULE, buckets=False)) == {"640x640x81"}
    assert shapes(wide, replace(RULE, buckets=False, multiple=32, video_size=250)) == {"224x224x81"}


def test_a_fixed_size_rules_out_all_that_is_drawn() -> None:
    rule = replace(
        RULE, fixed_size=(250, 401), adapt=True, token_budget=True, token_size=64, video_size=1024
    )
    assert shapes(LARGE, rule) == {"400x240x81"}
    assert shapes(PHOTO, replace(rule, multiple=32)) == {"384x224x1"}


def test_drawn_ratios() -> None:
    rule = replace(RULE, ratio_crop=True, video_size=512)
    found = [(clip.bucket.height, clip.bucket.width) for clip in drawn(LARGE, rule)]
    total = sum(often for _, often in RATIO_CROPS)
    for shape, often in RATIO_CROPS:
        assert found.count(shape) == pytest.approx(300 * often / total, abs=22), shape
    assert set(found) <= {shape for shape, _ in RATIO_CROPS}


def rate(source: float, wanted: float, frames: int = 400, asked: int = 9) -> list[int]:
    probe = Probe(frames=frames, height=480, width=832, fps=source)
    rule = replace(RULE, fps=wanted, frames=asked, clips="first")
    (clip,) = choose_clips(probe, MEDIA[0], rule)
    return list(clip.frame_indices)


def test_frame_rates() -> None:
    assert rate(24.0, 16.0) == [0, 2, 3, 5, 6, 8, 9, 11, 12]
    assert rate(32.0, 16.0) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert rate(60.0, 16.0) == [0, 4, 8, 11, 15, 19, 23, 26, 30]
    assert rate(12.0, 16.0) == [0, 1, 2, 2, 3, 4, 5, 5, 6]  # slower: shown longer, so twice
    assert rate(8.0, 16.0, frames=3) == [0, 1, 1, 2, 2]
    assert rate(24.0, 16.0, frames=8) == [0, 2, 3, 5, 6]
    with pytest.raises(MediaError, match="has no frame rate"):
        rate(0.0, 16.0)
    assert choose_clips(PHOTO, MEDIA[0], replace(RULE, fps=16.0)) == choose_clips(
        PHOTO, MEDIA[0], RULE
    )


def test_clips_of_one_long_video() -> None:
    probe = Probe(frames=100, height=480, width=832, fps=24.0)

    def starts(**settings: object) -> list[int]:
        rule = replace(RULE, frames=9, **settings)  # type: ignore[arg-type]
        clips = choose_clips(probe, MEDIA[0], rule)
        assert all(len(clip.frame_indices) == 9 for clip in clips)
        return [clip.frame_indices[0] for clip in clips]

    # 9 frames at stride 2 span 17 of 100: 84 places to start.
    assert starts(clips="first") == [0]
    assert starts(clips="uniform", clips_per_video=3) == [0, 41, 83]
    assert starts(clips="uniform") == [41]
    assert starts(clips="chunk") == [0, 18, 36, 54, 72]  # 5 of 9 are left, and dropped
    one = starts(clips="random")
    several = starts(clips="random", clips_per_video=4)
    assert several[:1] == one and len(set(several)) == 4
    short = Probe(frames=15, height=480, width=832, fps=24.0)
    (clip,) = choose_clips(short, MEDIA[0], replace(RULE, frames=9, clips="chunk"))
    assert clip.frame_indices == (0, 2, 4, 6, 8) and clip.asked == 9


def test_variants_are_other_draws_and_the_first_is_what_one_gives() -> None:
    rule = replace(RULE, adapt=True, ratio_crop=True, video_size=1024)
    (one,) = choose_clips(LARGE, MEDIA[0], rule)
    eight = choose_clips(LARGE, MEDIA[0], replace(rule, variants=8))
    assert eight[0] == one and len(set(eight)) == 8
    assert len({clip.frame_indices[0] for clip in eight}) == 8
    assert eight[:3] == choose_clips(LARGE, MEDIA[0], replace(rule, variants=3))
    # Nothing to draw: one sample, however many variants.
    fixed = replace(RULE, variants=8, clips="first")
    assert len(choose_clips(LARGE, MEDIA[0], fixed)) == 1


RULES = st.builds(
    ClipRule,
    image_size=st.integers(32, 2048),
    video_size=st.integers(32, 2048),
    token_size=st.integers(32, 2048),
    stride=st.integers(1, 5),
    fps=st.none() | st.floats(0.5, 120),
    frames=st.integers(0, 30).map(lambda n: 4 * n + 1),
    seed=st.integers(0, 1 << 40),
    multiple=st.sampled_from([16, 32]),
    temporal_stride=st.just(4),
    adapt=st.booleans(),
    token_budget=st.booleans(),
    buckets=st.booleans(),
    ratio_crop=st.booleans(),
    fixed_size=st.none() | st.tuples(st.integers(32, 999), st.integers(32, 999)),
    clips=st.sampled_from(["first", "random", "uniform", "chunk"]),
    clips_per_video=st.integers(1, 4),
    variants=st.integers(1, 3),
)


@given(
    rule=RULES,
    frames=st.integers(1, 700),
    fps=st.floats(1, 240),
    height=st.integers(100, 1500),
    width=st.integers(100, 1500),
    kind=st.sampled_from(["video", "image"]),
    gaps=st.none() | st.lists(st.floats(0.002, 2), min_size=1, max_size=9),
)
def test_whatever_is_asked(
    rule: ClipRule,
    frames: int,
    fps: float,
    gaps: list[float] | None,
    height: int,
    width: int,
    kind: Literal["video", "image"],
) -> None:
    probe = Probe(frames=frames, height=height, width=width, fps=fps if kind == "video" else None)
    if kind == "video" and gaps and frames > 1:
        seconds = np.cumsum([0.0, *np.resize(gaps, frames - 1)])
        fps = (frames - 1) / float(seconds[-1])
        probe = replace(probe, fps=fps, times=seconds.tobytes())
    clips = choose_clips(probe, MEDIA[1], rule)
    assert clips and len(set(clips)) == len(clips)
    assert clips == choose_clips(probe, MEDIA[1], rule)
    for clip in clips:
        indices, bucket = clip.frame_indices, clip.bucket
        assert len(indices) == bucket.frames <= clip.asked <= rule.frames or kind == "image"
        assert bucket.frames % 4 == 1
        slower = rule.fps is not None and kind == "video" and (gaps or fps < rule.fps)
        assert all(one < other or (slower and one == other) for one, other in pairwise(indices))
        assert indices[0] >= 0 and indices[-1] < (frames if kind == "video" else 1)
        assert bucket.height % rule.multiple == bucket.width % rule.multiple == 0
        assert min(bucket.height, bucket.width) >= rule.multiple
        shown = probe.seconds()
        if shown is not None and rule.fps is not None and rule.clips != "chunk":
            wanted = shown[indices[0]] + np.arange(len(indices)) / rule.fps
            off = np.abs(shown[:, None] - wanted)  # (frames, frames of the clip)
            assert (off[list(indices), np.arange(len(indices))] <= off.min(axis=0) + 1e-8).all()
    if kind == "video" and rule.clips == "chunk" and rule.variants == 1 and not slower:
        covered = [index for clip in clips for index in clip.frame_indices]
        assert len(set(covered)) == len(covered)


@given(
    size=st.integers(32, 4096),
    token=st.integers(32, 4096),
    frames=st.integers(0, 40).map(lambda n: 4 * n + 1),
)
def test_a_budget_is_kept_and_used(size: int, token: int, frames: int) -> None:
    found = budget_frames(size, frames=frames, token_size=token)
    assert found % 4 == 1 and 1 <= found <= frames
    assert found * size**2 <= frames * token**2 or found == 1
    assert found == frames or (found + 4) * size**2 > frames * token**2
