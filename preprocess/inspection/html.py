"""`wanprep inspect --html`: a cache as one page, pictures made of latents."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from preprocess.inspection.overview import (
    Histogram,
    Overview,
    drawn_across_buckets,
    histogram,
)
from preprocess.inspection.terminal import KINDS, durations_note, facts, size
from shared.format.cache import MemberReader
from shared.format.latent_rgb import R2_FLOOR
from shared.format.schema import seconds_of
from shared.io.durable import write_bytes
from shared.pages import html
from shared.pages.axis import nice_step
from shared.pages.thumbnail import thumbnail_of

_MOST_BUCKETS = 16  # bars


@dataclass(frozen=True, kw_only=True)
class Card:
    """A sample as the page shows it."""

    key: str
    picture: str | None
    """A data URI; None where the cache has no latent → RGB map."""
    width: int
    height: int
    what: str
    caption: str
    source: str


def write_page(path: Path, found: Overview, *, samples: int, seed: int) -> int:
    """Write the page; how many samples it shows."""
    with closing(MemberReader(found.index)) as reader:
        rows = drawn_across_buckets(found.index, samples, seed=seed)
        cards = [_card(found, reader, row) for row in rows]
    write_bytes(path, page(found, cards).encode("utf-8", "replace"))
    return len(cards)


def _card(found: Overview, reader: MemberReader, row: int) -> Card:
    info = reader.info(row)
    seconds = seconds_of(info)
    length = f"{info['frames']} frames" if info["frames"] > 1 else "image"
    if info["type"] == "text":
        length += ", " + KINDS["text"]
    what = [f"{info['width']}×{info['height']}", length]
    what += [f"{seconds:.1f} s"] if seconds is not None else []
    what += [f"{int(found.index.tokens[row])} tokens"]
    if found.index.repeats[row] != 1:
        what.append(f"shown {int(found.index.repeats[row])}× an epoch")
    return Card(
        key=found.index.key(row),
        picture=thumbnail_of(found.index, reader, row),
        width=info["width"],
        height=info["height"],
        what=" · ".join(what),
        caption=info["caption"],
        source=info["source"],
    )


def page(found: Overview, cards: Sequence[Card]) -> str:
    """The whole page as HTML text; everything it shows is inside it."""
    tokens = HistogramChart("Text tokens a sample", histogram(found.tokens), "tokens", "samples")
    histograms = [tokens]
    if len(found.seconds):
        title = f"Length of a video: {durations_note(found)}"
        histograms.append(HistogramChart(title, histogram(found.seconds), "seconds", "videos"))
    return (
        templates()
        .get_template("inspect_page.html")
        .render(
            folder=str(found.index.store),
            kinds=_kinds(found),
            mode=found.index.fingerprint.get("mode"),
            numbers=_numbers(found),
            buckets=_samples_of_buckets(found),
            bytes=[(name, number, size(number)) for name, number in found.bytes.items()],
            histograms=histograms,
            rgb=found.index.latent_rgb,
            r2_floor=R2_FLOOR,
            cards=cards,
            facts=facts(found),
        )
    )


def templates() -> Environment:
    """The page and its charts."""
    environment = html.templates(Path(__file__).parent)
    environment.filters["short"] = _short
    return environment


@dataclass(frozen=True)
class HistogramChart:
    """A histogram as the page draws it."""

    title: str
    bars: Histogram
    unit: str
    counted: str

    @property
    def ticks(self) -> list[float]:
        """Of the axis of counts: round numbers from 0 to above the longest bar."""
        most = max([1, *self.bars.counts])
        step = max(1.0, nice_step(most, 4))
        return [number * step for number in range(math.ceil(most / step) + 1)]


def _kinds(found: Overview) -> str:
    return " and ".join(
        f"{number:,} {KINDS[name]}{'s' if number != 1 and name != 'text' else ''}"
        for name, number in found.types.items()
        if number
    )


def _numbers(found: Overview) -> list[tuple[str, str]]:
    numbers = [
        (f"{found.samples:,}", "sample" if found.samples == 1 else "samples"),
        *([(f"{found.epoch:,}", "shown in an epoch")] if found.epoch != found.samples else []),
        (f"{len(found.buckets):,}", "bucket" if len(found.buckets) == 1 else "buckets"),
        (size(sum(found.bytes.values())), f"in {found.shards:,} shards"),
        (f"{found.captions.distinct:,}", "different captions"),
    ]
    if len(found.seconds):
        hours = float(found.seconds.mean()) * found.seconds_of / 3600
        length = f"{hours:.1f} h" if hours >= 1 else f"{3600 * hours:.0f} s"
        numbers.append((length, "of video"))
    return numbers


def _samples_of_buckets(found: Overview) -> list[tuple[str, int, str]]:
    """Label, samples and what stands behind them, of each bucket, the largest first."""
    ordered = sorted(found.buckets, key=lambda row: -row.samples)
    rows = [
        (
            f"{row.bucket.width}×{row.bucket.height}"
            + (" image" if row.bucket.frames == 1 else f" · {row.bucket.frames} fr."),
            row.samples,
        )
        for row in ordered[:_MOST_BUCKETS]
    ]
    if rest := ordered[_MOST_BUCKETS:]:
        rows.append((f"{len(rest)} more", sum(row.samples for row in rest)))
    return [(label, samples, f"{samples:,}") for label, samples in rows]


def _short(number: float) -> str:
    """1200 → 1.2k."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:g}{unit}"
    return f"{number:g}"
