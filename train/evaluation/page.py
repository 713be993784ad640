"""The comparison as one HTML page: numbers, and clips that play side by side."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.io.mp4 import read_mp4, write_mp4
from shared.pages.html import data_uri, templates
from train.evaluation.clips import MEASURES, SIDES, MeasuredClip
from train.evaluation.comparison import Comparison
from train.evaluation.measures import preview

_PREVIEW_CRF = 23


@dataclass(frozen=True)
class Shown:
    """A clip as the page shows it."""

    uri: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A prompt with one seed: a clip of each side."""

    prompt: str
    seed: int | None
    clips: Sequence[Shown]


def page(
    compared: Mapping[str, Comparison],
    clips: Sequence[MeasuredClip],
    settings: Mapping[str, Any],
    fps: float,
) -> str:
    """The whole page as HTML text; everything it shows is inside it."""
    each = [[clip for clip in clips if clip.side == side] for side in SIDES]
    rows = [
        Row(pair[0].prompt, pair[0].seed, [_shown(clip, fps) for clip in pair])
        for pair in zip(*each, strict=True)
    ]
    template = templates(Path(__file__).parent).get_template("evaluation_page.html")
    return template.render(
        sides=SIDES, compared=compared, units=MEASURES, rows=rows, settings=settings
    )


def _shown(clip: MeasuredClip, fps: float) -> Shown:
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "clip.mp4"
        write_mp4(small, preview(read_mp4(clip.path)), fps, crf=_PREVIEW_CRF)
        uri = data_uri("video/mp4", small.read_bytes())
    return Shown(uri, clip.numbers())
