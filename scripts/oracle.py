"""Read colour, shape and motion off the pixels of a clip of the synthetic world.

The oracle is strict: an object that vanishes, changes colour, has two colours or no clear shape
is described as None, which equals no caption.

    python scripts/oracle.py FOLDER     # of mp4 files with a metadata.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from render_clips import (
    ALL_MOTIONS,
    COLOURS,
    MOTIONS,
    REFERENCE_SIDE,
    SHAPES,
    parse_caption,
    shape_coverage,
)

# Chroma (max minus min of RGB, 0..255) where a pixel half covered by the paint lies.
OBJECT_CHROMA = 75
# Areas in pixels of a 64-pixel frame: the smallest triangle has about 370, the largest square 812.
SMALLEST_AREA, LARGEST_AREA = 220, 1150
# The share of the object's pixels that must have the object's colour, in every frame.
COLOUR_PURITY = 0.85
# Distance of the mean paint from the named colour, RGB, 0..255.
COLOUR_TOLERANCE = 55.0
# Intersection over union with the best template, averaged over the frames and in the worst one.
# A render scores 0.99, the VAE's reconstruction 0.97 (worst 0.92), a circle as a square 0.84.
SHAPE_MATCH, SHAPE_MATCH_WORST = 0.87, 0.75
# Pixels of a 64-pixel frame between the first and the last frame (real travel: 18..24).
MOVING, STILL = 9.0, 4.5
DIAGONAL = 0.7  # the shorter way over the longer one (of renders: 1)


@dataclass(frozen=True)
class Verdict:
    """What the oracle sees; None where it sees nothing clear."""

    colour: str | None
    shape: str | None
    motion: str | None

    def matches(self, caption: str) -> bool:
        """Whether colour, shape and motion are all those of the caption."""
        return (self.colour, self.shape, self.motion) == parse_caption(caption)


UNCLEAR = Verdict(None, None, None)


def object_mask(frame: np.ndarray) -> np.ndarray:
    """Pixels of a frame [H, W, 3] that belong to the object: bool [H, W]."""
    return np.ptp(frame.astype(np.int16), axis=-1) > OBJECT_CHROMA


def colour_of(pixels: np.ndarray) -> str | None:
    """The name of the colour that pixels [N, 3] share, or None where they do not."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], dtype=np.float64)

    def hue_vector(rgb: np.ndarray) -> np.ndarray:
        # Colour without brightness: soft edges are darker, but of the same hue.
        centred = rgb - rgb.mean(axis=-1, keepdims=True)
        return centred / np.linalg.norm(centred, axis=-1, keepdims=True).clip(1e-6)

    nearest = (hue_vector(pixels.astype(np.float64)) @ hue_vector(palette).T).argmax(axis=-1)
    winner = int(np.bincount(nearest, minlength=len(names)).argmax())
    mine = nearest == winner
    if mine.mean() < COLOUR_PURITY:
        return None
    paint = np.median(pixels[mine], axis=0)
    if np.linalg.norm(paint - palette[winner]) > COLOUR_TOLERANCE:
        return None
    return names[winner]


def template_overlaps(mask: np.ndarray) -> np.ndarray:
    """Overlap of a mask [H, W] with each shape at the same area and centroid: [len(SHAPES)]."""
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    overlaps = []
    for shape in SHAPES:
        # Areas grow with radius squared; measure the shape's own once, at radius 12.
        unit = shape_coverage(shape, width / 2, height / 2, 12.0, height, width)
        radius = 12.0 * np.sqrt(len(ys) / unit.sum())
        offset = centroid(unit)[0] - height / 2  # of the triangle: its centroid is low
        centre_y = ys.mean() + 0.5 - offset * radius / 12.0
        template = shape_coverage(shape, xs.mean() + 0.5, centre_y, radius, height, width) > 0.5
        overlaps.append((mask & template).sum() / (mask | template).sum())
    return np.array(overlaps)


def centroid(weight: np.ndarray) -> np.ndarray:
    """Centre of mass (y, x) in pixels, where pixel i spans i..i+1."""
    ys, xs = np.indices(weight.shape) + 0.5
    return np.array([(ys * weight).sum(), (xs * weight).sum()]) / weight.sum()


def motion_of(
    centroids: np.ndarray, scale: float, motions: Mapping[str, tuple[int, int]] = MOTIONS
) -> str | None:
    """Name the motion of centroids [T, 2] (y, x); None for one that is not in `motions`, too
    short, or neither along an axis nor along a diagonal."""
    y, x = (centroids[-1] - centroids[0]) / scale
    if np.ptp(centroids, axis=0).max() / scale <= STILL:
        return "standing still"
    along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
    if along < MOVING:
        return None
    direction = (int(np.sign(x)), int(np.sign(y)))
    if across <= along / 2:
        direction = (direction[0], 0) if abs(x) > abs(y) else (0, direction[1])
    elif across < DIAGONAL * along:
        return None
    return next((name for name, unit in motions.items() if unit == direction), None)


@dataclass(frozen=True)
class Look:
    """An object that is there in every frame, before anybody asks where it goes."""

    colour: str | None
    shape: str | None
    path: np.ndarray
    """Centroids [T, 2] (y, x), in pixels."""


def look(
    clip: np.ndarray, areas: tuple[float, float], match: float, match_worst: float
) -> Look | None:
    """The object of a clip, uint8 RGB [T, H, W, 3]; None where its area in pixels of a 64-pixel
    frame is not within `areas` throughout. `match`, `match_worst`: overlap with its shape."""
    scale = min(clip.shape[1:3]) / REFERENCE_SIDE
    masks = [object_mask(frame) for frame in clip]
    found = np.array([mask.sum() for mask in masks]) / scale**2
    if found.min() < areas[0] or found.max() > areas[1]:
        return None
    colours = {colour_of(frame[mask]) for frame, mask in zip(clip, masks, strict=True)}
    overlaps = np.stack([template_overlaps(mask) for mask in masks])  # [T, len(SHAPES)]
    best = int(overlaps.mean(axis=0).argmax())
    mean, worst = overlaps[:, best].mean(), overlaps[:, best].min()
    return Look(
        colour=colours.pop() if len(colours) == 1 else None,
        shape=SHAPES[best] if mean >= match and worst >= match_worst else None,
        path=np.stack([centroid(mask) for mask in masks]),
    )


def judge(clip: np.ndarray, motions: Mapping[str, tuple[int, int]] = MOTIONS) -> Verdict:
    """Describe a clip, uint8 RGB [T, H, W, 3], by what is in `motions`.

    `ALL_MOTIONS` has the one, too, that the toy models were never shown.
    """
    seen = look(clip, (SMALLEST_AREA, LARGEST_AREA), SHAPE_MATCH, SHAPE_MATCH_WORST)
    if seen is None:
        return UNCLEAR
    scale = min(clip.shape[1:3]) / REFERENCE_SIDE
    return Verdict(seen.colour, seen.shape, motion_of(seen.path, scale, motions))


def matching(verdicts: list[Verdict], captions: list[str]) -> float:
    """Share of the verdicts that match their caption in colour, shape and motion."""
    return float(np.mean([v.matches(c) for v, c in zip(verdicts, captions, strict=True)]))


def read_clip(path: Path) -> np.ndarray:
    """All frames of a video file through decord: uint8 RGB [T, H, W, 3]."""
    import decord

    return decord.VideoReader(str(path), num_threads=1)[:].asnumpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    entries = json.loads((args.folder / "metadata.json").read_text())
    captions = [entry["text"] for entry in entries]
    verdicts = [
        judge(read_clip(args.folder / entry["file_path"]), ALL_MOTIONS) for entry in entries
    ]
    for entry, verdict in zip(entries, verdicts, strict=True):
        if not verdict.matches(entry["text"]):
            print(f"{entry['file_path']}: {entry['text']!r} looks like {verdict}")
    print(f"{matching(verdicts, captions):.3f} of {len(verdicts)} clips match their caption")


if __name__ == "__main__":
    main()
