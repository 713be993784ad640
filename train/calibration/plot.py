"""w*(σ) as a small SVG, one line an expert."""

from collections.abc import Iterator, Mapping
from html import escape

from train.methods.guidance_file import Calibration

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 28, 40
COLOURS = {"high": "#c44e52", "low": "#4c72b0", "full": "#55a868"}


def plot(experts: Mapping[str, Calibration]) -> str:
    """Scales over σ, bars of two standard errors each way."""
    top = max(2.0, *(max(one.scales) + 0.5 for one in experts.values()))
    bottom = min(0.0, *(min(one.scales) for one in experts.values()))

    def x(sigma: float) -> float:
        return LEFT + sigma * (WIDTH - LEFT - RIGHT)

    def y(scale: float) -> float:
        inside = min(max(scale, bottom), top)
        return TOP + (top - inside) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    def parts() -> Iterator[str]:
        for step in range(6):
            sigma, scale = step / 5, bottom + step / 5 * (top - bottom)
            yield _text(x(sigma), HEIGHT - BOTTOM + 16, f"{sigma:g}", "middle")
            yield _text(LEFT - 6, y(scale) + 4, f"{scale:.1f}", "end")
            yield _line(LEFT, y(scale), WIDTH - RIGHT, y(scale), "#ddd")
        yield _line(LEFT, y(1), WIDTH - RIGHT, y(1), "#888")
        yield _text(WIDTH / 2, HEIGHT - 8, "noise level sigma", "middle")
        for number, (expert, one) in enumerate(sorted(experts.items())):
            colour = COLOURS.get(expert, "#333")
            points = [(x(s), y(w)) for s, w in zip(one.sigmas, one.scales, strict=True)]
            joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
            for s, w, e in zip(one.sigmas, one.scales, one.spread, strict=True):
                yield _line(x(s), y(w - 2 * e), x(s), y(w + 2 * e), colour)
            label = f"{expert}: {one.model}, {one.clips} clips"
            yield _text(LEFT, 16 + 14 * number, label, "start", colour)

    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    inside = "\n".join(parts())
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{inside}\n</svg>\n'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
