"""The demo's result as one HTML page that plays: clips, loss curves, time per clip. No network."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from shared.io.mp4 import Clip, write_mp4

FPS = 12
TEMPLATE = Path(__file__).with_name("demo_page.html")


@dataclass(frozen=True)
class Column:
    """One way to make clips: the source, a teacher, the student."""

    title: str
    clips: Sequence[Clip]
    """One a prompt, (F, H, W, 3) uint8."""
    seconds: float | None = None
    """Median time of a clip, without loading; None for the source."""
    passes: int | None = None
    """Transformer passes of a clip."""


@dataclass(frozen=True)
class Curve:
    """A loss over updates."""

    title: str
    steps: Sequence[int]
    values: Sequence[float]


def read_curves(logs: Path, run: Path) -> list[Curve]:
    """The losses that `wantrain distill` logged for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
    events.Reload()
    curves = []
    for tag in sorted(tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")):
        points = events.Scalars(tag)
        title = f"{run.name.removeprefix('lora-')}-noise expert: {tag.removeprefix('loss/')} loss"
        curves.append(Curve(title, [p.step for p in points], [p.value for p in points]))
    return curves


def mp4_uri(clip: Clip) -> str:
    """The clip as a data URI of an H.264 file that browsers play."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, clip, FPS)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width` − 1 before it."""
    return [float(np.mean(values[max(0, end - width) : end])) for end in range(1, len(values) + 1)]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    step = 10 ** np.floor(np.log10((high - low) / count))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [float(t) for t in np.arange(np.ceil(low / step), high / step + 1e-9) * step]


def curve_svg(curve: Curve) -> str:
    """Points faint, running mean strong, axes with round numbers."""
    width, height, left, bottom, top, right = 340, 190, 44, 34, 8, 10
    low, high = min(curve.values), max(curve.values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    first, last = min(curve.steps), max(curve.steps)
    span = max(last - first, 1)

    def x(step: float) -> float:
        return left + (step - first) / span * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - low) / (high - low) * (height - bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(curve.title)}">']
    for tick in nice_ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:.3g}</text>'
        )
    for tick in nice_ticks(first, last if last > first else first + 1):
        if float(tick).is_integer():
            parts.append(
                f'<text x="{x(tick):.1f}" y="{height - bottom + 16}" '
                f'text-anchor="middle">{tick:.0f}</text>'
            )
    for step, value in zip(curve.steps, curve.values, strict=True):
        parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="1.6"/>')
    smooth = running_mean(curve.values, max(1, len(curve.values) // 8))
    line = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.steps, smooth, strict=True))
    parts.append(f'<polyline points="{line}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 3}" text-anchor="middle">updates</text></svg>')
    return "".join(parts)


def _head_cell(column: Column) -> str:
    if column.seconds is None or column.passes is None:
        told = "what stage one encoded"
    else:
        told = f"{column.passes} transformer passes, {column.seconds:.2f} s a clip"
    return f"<th>{escape(column.title)}<small>{told}</small></th>"


def page(
    prompts: Sequence[str],
    columns: Sequence[Column],
    curves: Sequence[Curve],
    commands: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """The whole page as HTML text; everything it shows is inside it."""
    rows = []
    for number, prompt in enumerate(prompts):
        cells = "".join(
            f'<td data-title="{escape(column.title)}"><video src="{mp4_uri(column.clips[number])}" '
            "autoplay loop muted playsinline></video></td>"
            for column in columns
        )
        rows.append(f"<tr><th>{escape(prompt)}</th>{cells}</tr>")
    figures = "".join(
        f"<figure>{curve_svg(curve)}<figcaption>{escape(curve.title)}</figcaption></figure>"
        for curve in curves
    )
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    filled = {
        "HEAD": "<tr><th></th>" + "".join(map(_head_cell, columns)) + "</tr>",
        "ROWS": "".join(rows),
        "CURVES": figures,
        "COMMANDS": escape("\n\n".join(commands)),
        "FACTS": listed,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    head, *rest = text.split("{{")  # filled in one pass: what a prompt says is never a placeholder
    return head + "".join(filled[part.split("}}", 1)[0]] + part.split("}}", 1)[1] for part in rest)
