"""`wanprep inspect --html`: a cache as one page, pictures made of latents. No network, no script.

Whatever a caption says is text: everything from the cache is escaped, and the page's own policy
forbids scripts and addresses.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.inspection.overview import (
    Histogram,
    Overview,
    drawn_across_buckets,
    histogram,
    nice_step,
    seconds_of,
)
from preprocess.inspection.terminal import KINDS, durations_note, facts, size
from shared.format.cache import MemberReader
from shared.format.latent_rgb import R2_FLOOR, latents_to_rgb
from shared.format.schema import LATENTS_MEMBER
from shared.io.durable import write_bytes
from shared.io.mirror import shown

_TEMPLATE = Path(__file__).with_name("inspect_page.html")
_MOST_FRAMES = 24  # of a thumbnail
_LONG_SIDE = 208  # pixels of a thumbnail, about; a latent cell becomes a whole number of them
_SHORTEST_MS = 20  # what browsers still keep to


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
    cards = read_cards(found, drawn_across_buckets(found.index, samples, seed=seed))
    write_bytes(path, page(found, cards).encode("utf-8", "replace"))
    return len(cards)


def read_cards(found: Overview, rows: Sequence[int]) -> list[Card]:
    """The samples, with pictures made by the cache's own latent → RGB map."""
    cards = []
    reader = MemberReader(found.index)
    try:
        for row in rows:
            info = reader.info(row)
            tensors = reader.read(row, LATENTS_MEMBER)
            seconds = seconds_of(info)
            picture = None
            if tensors is not None and found.latent_rgb is not None:
                frames = latents_to_rgb(tensors["latents"], found.latent_rgb)
                picture = thumbnail(frames, seconds)
            length = f"{info['frames']} frames" if info["frames"] > 1 else "image"
            if info["type"] == "text":
                length += ", " + KINDS["text"]
            what = [f"{info['width']}×{info['height']}", length]
            what += [f"{seconds:.1f} s"] if seconds is not None else []
            what += [f"{int(found.index.tokens[row])} tokens"]
            if found.index.repeats[row] != 1:
                what.append(f"shown {int(found.index.repeats[row])}× an epoch")
            cards.append(
                Card(
                    key=found.index.key(row),
                    picture=picture,
                    width=int(info["width"]),
                    height=int(info["height"]),
                    what=" · ".join(what),
                    caption=str(info["caption"]),
                    source=str(info["source"]),
                )
            )
    finally:
        reader.close()
    return cards


def thumbnail(frames: npt.NDArray[np.uint8], seconds: float | None) -> str:
    """Frames (T, h, w, 3), a pixel a latent cell, as a WebP that moves at the clip's own speed."""
    count = min(len(frames), _MOST_FRAMES)
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    _, height, width, _ = chosen.shape
    zoom = max(1, round(_LONG_SIDE / max(height, width)))
    images = [
        Image.fromarray(frame).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
        for frame in chosen
    ]
    each = max(_SHORTEST_MS, round(1000 * (seconds or 1) / count))
    out = io.BytesIO()
    images[0].save(
        out,
        "WEBP",
        quality=82,
        method=4,
        **(
            {"save_all": True, "append_images": images[1:], "duration": each, "loop": 0}
            if count > 1
            else {}
        ),
    )
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def page(found: Overview, cards: Sequence[Card]) -> str:
    """The whole page as HTML text; everything it shows is inside it."""
    figures = [
        _figure("Samples of each bucket", buckets_svg(found)),
        _figure("Bytes by component", bytes_svg(found)),
        _figure(
            "Text tokens a sample", histogram_svg(histogram(found.tokens), "tokens", "samples")
        ),
    ]
    if len(found.seconds):
        title = f"Length of a video: {durations_note(found)}"
        drawn = histogram_svg(histogram(found.seconds), "seconds", "videos")
        figures.append(_figure(title, drawn))
    rgb = found.latent_rgb
    warns = rgb is not None and rgb.r2 is not None and rgb.r2 < R2_FLOOR
    filled = {
        "TITLE": escape(shown(str(found.folder))),
        "LEAD": _lead(found),
        "NUMBERS": "".join(f"<div><b>{escape(n)}</b>{escape(t)}</div>" for n, t in _numbers(found)),
        "CHARTS": "".join(figures),
        "PREVIEW": _preview(found, len(cards)),
        "WARNING": _warning(found) if warns or rgb is None else "",
        "CARDS": "".join(map(_card, cards)),
        "FACTS": "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(found)
        ),
    }
    head, *rest = _TEMPLATE.read_text(encoding="utf-8").split("{{")
    # Filled in one pass: what a caption says is never a placeholder.
    return head + "".join(filled[part.split("}}", 1)[0]] + part.split("}}", 1)[1] for part in rest)


def _lead(found: Overview) -> str:
    kinds = " and ".join(
        f"{number:,} {KINDS[name]}{'s' if number != 1 and name != 'text' else ''}"
        for name, number in found.types.items()
        if number
    )
    mode = escape(str(found.fingerprint.get("mode")))
    return f"{kinds or 'No samples'}, encoded for <b>{mode}</b> training."


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
        told = f"{hours:.1f} h" if hours >= 1 else f"{3600 * hours:.0f} s"
        numbers.append((told, "of video"))
    return numbers


def _preview(found: Overview, shown_samples: int) -> str:
    rgb = found.latent_rgb
    if rgb is None:
        return f"{shown_samples} samples, drawn across the buckets."
    quality = (
        "R² unknown" if rgb.r2 is None else f"R² {rgb.r2:.2f} on {rgb.held_out} held-out samples"
    )
    return (
        f"{shown_samples} samples, drawn across the buckets. The pictures are the cached latents "
        f"themselves: a linear map gives each latent cell a colour, without a VAE ({quality}). "
        "They show layout, colour and motion, not detail."
    )


def _warning(found: Overview) -> str:
    rgb = found.latent_rgb
    if rgb is None:
        said = (
            "This cache was encoded before there was a latent → RGB map, so there are no pictures."
        )
    else:
        said = (
            f"The map explains only {100 * max(rgb.r2 or 0, 0):.0f}% of the colours' variance (R² "
            f"below {R2_FLOOR}): these pictures mislead. Look at the samples through the VAE "
            "instead: wanprep verify --decode 5"
        )
    return f'<p class="warning">{escape(said)}</p>'


def _card(card: Card) -> str:
    if card.picture is None:
        picture = '<div class="none">no preview</div>'
    else:
        picture = (
            f'<img src="{card.picture}" width="{card.width}" height="{card.height}" '
            f'alt="preview of {escape(card.source)}">'
        )
    said = escape(card.caption) if card.caption.strip() else "<i>no caption</i>"
    return (
        f'<article>{picture}<p class="caption" title="{escape(card.caption)}">{said}</p>'
        f'<p class="what">{escape(card.what)}</p><p class="source">{escape(card.source)}</p>'
        f'<p class="key">{escape(card.key)}</p></article>'
    )


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def histogram_svg(bars: Histogram, unit: str, counted: str) -> str:
    """Bars over an axis with round numbers; `unit` below it, what is counted beside the other."""
    width, height, left, right, top, bottom = 440, 220, 46, 14, 24, 42
    step = max(1.0, nice_step(max([1, *bars.counts]), 4))
    high = -(-max([1, *bars.counts]) // step) * step
    parts, number = [], 0.0

    def y(value: float) -> float:
        return height - bottom - value / high * (height - bottom - top)

    def x(edge: int) -> float:
        return left + edge / len(bars.counts) * (width - left - right)

    while number <= high:
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(number):.1f}" '
            f'y2="{y(number):.1f}"/><text x="{left - 7}" y="{y(number) + 4:.1f}" '
            f'text-anchor="end">{_short(number)}</text>'
        )
        number += step
    for place, count in enumerate(bars.counts):
        parts.append(
            f'<rect x="{x(place) + 1:.1f}" y="{y(count):.1f}" width="{x(1) - x(0) - 2:.1f}" '
            f'height="{y(0) - y(count):.1f}" rx="1.5"><title>{bars.edges[place]:g} to '
            f"{bars.edges[place + 1]:g} {unit}: {count:,}</title></rect>"
        )
    every = -(-len(bars.edges) // 9)
    for place in range(0, len(bars.edges), every):
        parts.append(
            f'<text x="{x(place):.1f}" y="{height - bottom + 17}" text-anchor="middle">'
            f"{bars.edges[place]:g}</text>"
        )
    parts.append(
        f'<text x="{(left + width - right) / 2:.1f}" y="{height - 6}" text-anchor="middle">{unit}'
        f'</text><text x="2" y="13">{counted}</text>'
    )
    return _svg(width, height, f"{counted} by {unit}", parts)


def _short(number: float) -> str:
    """1200 → 1.2k."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:g}{unit}"
    return f"{number:g}"


def _bars_svg(title: str, rows: Sequence[tuple[str, float, str]], css: str = "") -> str:
    """A bar a row: label, length, what stands at its end."""
    line, left, right, width = 25, 132, 84, 440
    longest = max([1.0, *(length for _, length, _ in rows)])
    parts = []
    for number, (label, length, end) in enumerate(rows):
        y = number * line
        reach = (width - left - right) * length / longest
        parts.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{css}" x="{left}" y="{y + 5}" width="{max(reach, 1.5):.1f}" height="16" '
            f'rx="2"/><text x="{left + max(reach, 1.5) + 7:.1f}" y="{y + 17}">{escape(end)}</text>'
        )
    return _svg(width, max(line, line * len(rows)), title, parts)


_MOST_BUCKETS = 16


def buckets_svg(found: Overview) -> str:
    """Samples of each bucket, the largest first."""
    ordered = sorted(found.buckets, key=lambda row: -row.samples)
    rows = [
        (
            f"{row.bucket.width}×{row.bucket.height}"
            + (" image" if row.bucket.frames == 1 else f" · {row.bucket.frames} fr."),
            float(row.samples),
            f"{row.samples:,}",
        )
        for row in ordered[:_MOST_BUCKETS]
    ]
    if rest := ordered[_MOST_BUCKETS:]:
        samples = sum(row.samples for row in rest)
        rows.append((f"{len(rest)} more", float(samples), f"{samples:,}"))
    return _bars_svg("samples of each bucket", rows)


def bytes_svg(found: Overview) -> str:
    """Bytes of each component."""
    rows = [(name, float(number), size(number)) for name, number in found.bytes.items()]
    return _bars_svg("bytes by component", rows, "bytes")
