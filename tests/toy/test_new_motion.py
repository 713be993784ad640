"""The motion that the toy never saw: rendered, read strictly, and in nobody's way."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from oracle import Verdict, judge, matching
from render_clips import ALL_MOTIONS, CAPTIONS, NEW_CAPTIONS, parse_caption, render_clip
from test_render_and_oracle import RENDER_CLIPS


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Two renders of every new caption."""
    return [render_clip(NEW_CAPTIONS[i % 12], 700 + i) for i in range(24)]


def seen(clips: list[np.ndarray]) -> list[Verdict]:
    return [judge(clip, ALL_MOTIONS) for clip in clips]


def test_twelve_captions_that_are_none_of_the_sixty() -> None:
    assert len(set(NEW_CAPTIONS)) == 12 and not set(NEW_CAPTIONS) & set(CAPTIONS)
    assert {parse_caption(caption)[2] for caption in NEW_CAPTIONS} == {"moving diagonally"}


def test_the_oracle_reads_renders_and_is_at_chance_on_shuffled_captions(
    clips: list[np.ndarray],
) -> None:
    captions = [NEW_CAPTIONS[i % 12] for i in range(24)]
    verdicts = seen(clips)
    assert matching(verdicts, captions) == 1
    rng = np.random.default_rng(0)
    shuffled = [matching(verdicts, list(rng.permutation(captions))) for _ in range(20)]
    assert np.mean(shuffled) < 0.15  # one in twelve


def test_another_direction_is_wrong(clips: list[np.ndarray]) -> None:
    for turned in (
        [clip[::-1] for clip in clips],  # back
        [clip[:, :, ::-1] for clip in clips],  # down to the left
        [clip[:, ::-1] for clip in clips],  # up to the right, upside down
    ):
        assert {verdict.motion for verdict in seen(turned)} == {None}


def test_a_way_between_the_diagonal_and_an_axis_is_wrong() -> None:
    clip = render_clip("a red circle moving diagonally", 3)
    bent = np.stack([np.roll(frame, -t // 2, axis=0) for t, frame in enumerate(clip)])
    assert judge(bent, ALL_MOTIONS).motion is None  # right by 18 to 24 pixels, down by 8 less


def test_who_does_not_ask_for_it_does_not_hear_of_it(clips: list[np.ndarray]) -> None:
    assert {judge(clip).motion for clip in clips} == {None}
    old = [render_clip(caption, 900) for caption in CAPTIONS]
    assert [judge(clip) for clip in old] == seen(old)


def test_a_dataset_of_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, str(RENDER_CLIPS), "--output", str(tmp_path), "--count", "3"]
    subprocess.run([*command, "--new"], check=True, capture_output=True)
    entries = json.loads((tmp_path / "metadata.json").read_text())
    assert [entry["text"] for entry in entries] == list(NEW_CAPTIONS[:3])
