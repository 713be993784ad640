"""`wanprep inspect` on a terminal."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from preprocess.inspection.overview import SHORT_TOKENS, Histogram, Overview, histogram
from shared.cache import report
from shared.cli.console import count
from shared.cli.support import say
from shared.io.names import on_one_line

KINDS = {"video": "video", "image": "image", "text": "text-only"}
_BAR = 32  # characters of the longest bar
_DIGEST = 12  # of a digest, so many digits are shown


def size(bytes_: float) -> str:
    """12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 1000:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.2f} TB"


def facts(found: Overview) -> Iterator[tuple[str, str]]:
    """(name, value) of what is no table and no chart."""
    types = ", ".join(f"{number} {KINDS[name]}" for name, number in found.types.items() if number)
    yield "samples", f"{found.samples} ({types or 'none'})"
    if found.epoch != found.samples:
        yield "epoch", f"{found.epoch} samples, repeats counted"
    yield "shards", f"{found.shards}, {size(sum(found.bytes.values()))} with index and sidecars"
    if found.dead:
        dead = f"{count(found.dead, 'sample')}, {size(found.dead_bytes)}"
        yield "dead", f"{dead}: wanprep compact"
    if found.tombstones:
        yield "removed", f"{count(found.tombstones, 'key')} in tombstones"
    yield "captions", captions(found)
    if found.captions.most_common is not None:
        caption = on_one_line(found.captions.most_common)
        caption = caption if len(caption) <= 80 else caption[:79] + "…"
        having = count(found.captions.most_common_samples, "sample")
        yield "most common", f"{having} have “{caption}”"
    for overlay in found.overlays:
        lacks = f", {overlay.lacking} of the cache without" if overlay.lacking else ""
        orphans = f", {overlay.orphans} of samples that are gone" if overlay.orphans else ""
        held = f"{count(overlay.samples, 'sample')}, {size(overlay.bytes)}"
        yield overlay.name, held + lacks + orphans
    yield from fingerprint(found)
    yield "preview", preview(found)


def captions(found: Overview) -> str:
    """How many differ, and which ones to look at."""
    numbers = found.captions
    parts = [f"{numbers.distinct} different"]
    if numbers.empty:
        parts.append(f"{numbers.empty} empty")
    if numbers.short > numbers.empty:
        parts.append(f"{numbers.short - numbers.empty} of at most {SHORT_TOKENS} tokens")
    parts.append(f"longest {numbers.longest} tokens")
    if numbers.at_token_limit:
        parts.append(f"{numbers.at_token_limit} at the token limit, perhaps truncated")
    return ", ".join(parts)


def fingerprint(found: Overview) -> Iterator[tuple[str, str]]:
    """The settings that decided the bytes, as far as people ask for them."""
    settings = found.index.fingerprint
    yield "mode", str(settings.get("mode"))
    latents, text = settings.get("latents", {}), settings.get("text", {})
    stride = "×".join(map(str, latents.get("stride", ())))
    yield (
        "latents",
        f"{latents.get('channels')} channels, stride {stride}, {latents.get('dtype')}; VAE "
        f"{str(latents.get('vae'))[:_DIGEST]}, computed in {latents.get('compute')}",
    )
    yield (
        "text",
        f"width {text.get('dim')}, at most {text.get('max_length')} tokens, {text.get('dtype')}; "
        f"encoder {str(text.get('encoder'))[:_DIGEST]}, computed in {text.get('compute')}",
    )
    media = settings.get("media", {})
    chosen = {
        name.replace("_sample", ""): value
        for name, value in media.items()
        if name not in ("resize", "frame_rule", "bucket_table")
    }
    yield "media", ", ".join(f"{name} {value}" for name, value in chosen.items())


def preview(found: Overview) -> str:
    """How good the latent → RGB map is."""
    rgb = found.index.latent_rgb
    if rgb is None:
        if found.types["text"] == found.samples:
            return "no latent → RGB map: text-only samples have no images"
        return "no latent → RGB map: this cache was encoded before there was one"
    return report.preview(rgb)


def durations_note(found: Overview) -> str:
    """Of which videos the durations are."""
    if len(found.seconds) == found.seconds_of:
        return f"all {count(found.seconds_of, 'video')}"
    return f"{len(found.seconds)} drawn of {count(found.seconds_of, 'video')}"


def print_overview(found: Overview, console: Console) -> None:
    """Tables and histograms; `console` is stdout's."""
    say(console, str(found.index.store), style="bold")
    table = Table.grid(padding=(0, 2))
    for name, value in facts(found):
        warns = "WARNING" in value
        table.add_row(Text(name, style="dim"), Text(value, style="yellow" if warns else ""))
    console.print(table)
    tables = [_buckets(found), _bytes(found)]
    tables.append(_histogram("Text tokens a sample", histogram(found.tokens), "tokens"))
    if len(found.seconds):
        title = f"Seconds a video ({durations_note(found)})"
        tables.append(_histogram(title, histogram(found.seconds), "s"))
    for about in tables:
        console.print()
        console.print(about)


def _table(title: str, columns: Mapping[str, JustifyMethod]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for name, justify in columns.items():
        table.add_column(name, justify=justify, header_style="dim")
    return table


def _buckets(found: Overview) -> Table:
    repeated = ["an epoch"] if found.epoch != found.samples else []
    numbers = ["latents", "samples", *repeated, "text tokens", "bytes"]
    table = _table("Buckets", {"bucket": "left", **dict.fromkeys(numbers, "right")})
    latents = found.index.fingerprint.get("latents", {})
    for row in found.buckets:
        shape: tuple[int, ...] = ()
        if latents:
            shape = row.bucket.latent_shape(latents["channels"], tuple(latents["stride"]))
        what = "image" if row.bucket.frames == 1 else f"{row.bucket.frames} frames"
        table.add_row(
            f"{row.bucket.width}×{row.bucket.height}, {what}",
            "×".join(map(str, shape)),
            str(row.samples),
            *([str(row.epoch)] if repeated else []),
            f"{row.tokens:.1f}",
            size(row.bytes),
        )
    return table


def _bytes(found: Overview) -> Table:
    table = _table("Bytes", {"component": "left", "bytes": "right", "share": "right", "": "left"})
    total = max(1, sum(found.bytes.values()))
    most = max([1, *found.bytes.values()])
    for name, bytes_ in found.bytes.items():
        table.add_row(name, size(bytes_), f"{100 * bytes_ / total:.1f}%", _bar(bytes_, most))
    return table


def _histogram(title: str, bars: Histogram, unit: str) -> Table:
    table = _table(title, {unit: "right", "samples": "right", "": "left"})
    most = max([1, *bars.counts])
    for low, high, number in zip(bars.edges, bars.edges[1:], bars.counts, strict=False):
        table.add_row(f"{low:g} – {high:g}", str(number), _bar(number, most))
    return table


def _bar(value: int, most: int) -> Text:
    return Text("█" * max(round(_BAR * value / most), 1 if value else 0), style="cyan")


def saved(path: Path, number: int) -> str:
    """The line about the page that was written."""
    return f"{path}: {count(number, 'sample')} to look at, {size(path.stat().st_size)}"
