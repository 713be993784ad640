"""The demo's page is whole, plays, needs nothing from outside and shows what it was given."""

import base64
import sys
from pathlib import Path

import decord
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.html_page import Parsed

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from demo_page import Column, Curve, curve_svg, nice_ticks, page, read_curves, running_mean
from render_clips import render_clip

HOSTILE = 'a "red" <script>alert(1)</script> & {{ROWS}} circle'


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [render_clip(f"a {colour} square moving up", 3) for colour in ("red", "blue")]


@pytest.fixture(scope="module")
def html(clips: list[np.ndarray]) -> str:
    columns = [Column("source", clips), Column("student", clips[::-1], seconds=0.123, passes=4)]
    curves = [Curve("critic <loss>", [1, 2, 3], [3.0, 2.0, 1.5])]
    return page([HOSTILE, "two"], columns, curves, ["run <it>"], {"seed": "7"})


def test_it_needs_nothing_from_outside(html: str) -> None:
    parsed = Parsed(html)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "img", "object")
        for name in ("src", "href", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_what_users_write_is_text(html: str) -> None:
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert HOSTILE in parsed.text
    assert "run <it>" in parsed.text and "critic <loss>" in parsed.text
    assert "4 transformer passes, 0.12 s a clip" in parsed.text


def test_the_clips_play(html: str, clips: list[np.ndarray], tmp_path: Path) -> None:
    videos = [attributes for tag, attributes in Parsed(html).tags if tag == "video"]
    assert len(videos) == 4
    for number, shown in enumerate([0, 1, 1, 0]):  # rows are prompts, columns the ways to make them
        assert {"autoplay", "loop", "muted", "playsinline"} <= videos[number].keys()
        file = tmp_path / f"{number}.mp4"
        file.write_bytes(base64.b64decode(str(videos[number]["src"]).split(",", 1)[1]))
        frames = decord.VideoReader(str(file))[:].asnumpy()
        assert frames.shape == (17, 64, 64, 3)
        error = np.abs(frames.astype(int) - clips[shown]).mean()
        assert error < 6 < np.abs(frames.astype(int) - clips[1 - shown]).mean()


def test_curves_come_from_the_logs_of_a_run(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "lora-low" / "logs")) as logs:
        for step in range(1, 40):
            logs.add_scalar("loss/critic", 1 / step, step)
            logs.add_scalar("learning_rate/critic", 1e-5, step)
    (curve,) = read_curves(tmp_path / "lora-low" / "logs", tmp_path / "lora-low")
    assert curve.title == "low-noise expert: critic loss"
    assert list(curve.steps) == list(range(1, 40))
    assert curve.values == pytest.approx([1 / step for step in range(1, 40)])
    svg = curve_svg(curve)
    assert svg.count("<circle") == 39
    heights = [float(part.split('"')[1]) for part in svg.split(" cy=")[1:]]
    assert heights == sorted(heights)  # a falling loss goes down the page
    assert min(heights) >= 0 and max(heights) <= 190


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [-1.0, 1e-7]])
def test_degenerate_curves_are_drawn(values: list[float]) -> None:
    svg = curve_svg(Curve("c", list(range(1, 1 + len(values))), values))
    assert svg.count("<circle") == len(values) and "nan" not in svg


def test_smoothing_and_ticks() -> None:
    assert running_mean([1, 2, 6, 4], 2) == [1, 1.5, 4, 5]
    assert nice_ticks(0, 1) == pytest.approx([0, 0.5, 1])
    assert nice_ticks(13, 58) == pytest.approx([20, 40])
    assert nice_ticks(-0.02, 0.07) == pytest.approx([0, 0.05])
