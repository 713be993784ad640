"""The harder world: captions with a speed, objects of any size and place, a textured background.

What the plain world (`render_clips.py`) cannot show: slow motion (captions name a speed), clips
that look alike (size, place and the background's stripes and dots are free), and blur (stripes and
dots are decided at the last step of four, where a student that averages paints grey).

One hundred and eight captions, "a {colour} {shape} {motion} {speed}".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from oracle import MOVING, centroid, look, motion_of, object_mask
from render_clips import COLOURS, MOTIONS, REFERENCE_SIDE, SHAPES, SUPPORT, shape_coverage

# Pixels that an object travels in a clip; frames have 64.
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (7.0, 11.0), "fast": (22.0, 27.0)}
STILL = "standing still"
RADIUS = (10.0, 13.5)
DOTS = 3
DOT_RADIUS = (5.0, 8.0)
DOT_CONTRAST = (35.0, 55.0)  # of 255, darker than what is behind
STRIPE_PERIOD = (16.0, 28.0)  # pixels
STRIPE_AMPLITUDE = (16.0, 24.0)  # of 255


def _captions() -> tuple[str, ...]:
    ways = [STILL] + [f"{m} {s}" for m, s in itertools.product(MOTIONS, SPEEDS) if m != STILL]
    return tuple(f"a {c} {s} {w}" for c, s, w in itertools.product(COLOURS, SHAPES, ways))


CAPTIONS = _captions()


@dataclass(frozen=True)
class Seen:
    """What a caption names, or the oracle sees; None where nothing is clear."""

    colour: str | None
    shape: str | None
    motion: str | None
    speed: str | None
    """None, too, for an object that stands still."""


def parse_caption(caption: str) -> Seen:
    """Split a caption; ValueError for one not of this world."""
    if caption not in CAPTIONS:
        raise ValueError(f"not a caption of the harder world: {caption!r}")
    _, colour, shape, way = caption.split(" ", 3)
    if way == STILL:
        return Seen(colour, shape, STILL, None)
    motion, speed = way.rsplit(" ", 1)
    return Seen(colour, shape, motion, speed)


def render_clip(
    caption: str, seed: int, frames: int = 17, height: int = 64, width: int = 64
) -> np.ndarray:
    """Render a caption: uint8 RGB [T, H, W, 3], a pure function of its arguments."""
    told = parse_caption(caption)
    rng = np.random.default_rng([seed, CAPTIONS.index(caption)])
    scale = min(height, width) / REFERENCE_SIDE
    radius = rng.uniform(*RADIUS) * scale
    travel = rng.uniform(*SPEEDS[told.speed]) * scale if told.speed else 0.0
    direction = np.array(MOTIONS[told.motion], dtype=np.float64)

    # The middle of the path, such that both of its ends are inside.
    margin = SUPPORT * radius + np.abs(direction) * travel / 2
    middle = rng.uniform(margin, np.array([width, height]) - margin)
    progress = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    centres = middle + progress[:, None] * direction * travel  # [T, 2], (x, y)

    # Grey stripes across or along, and grey dots: nothing that has a colour.
    grey = rng.uniform(70, 85)
    along = np.arange(width)[None, :] if rng.random() < 0.5 else np.arange(height)[:, None]
    wave = np.sin(2 * np.pi * (along / (rng.uniform(*STRIPE_PERIOD) * scale) + rng.random()))
    canvas = np.broadcast_to(grey + rng.uniform(*STRIPE_AMPLITUDE) * wave, (height, width)).copy()
    for _ in range(DOTS):
        x, y = rng.uniform(0, [width, height])
        cover = shape_coverage("circle", x, y, rng.uniform(*DOT_RADIUS) * scale, height, width)
        canvas -= cover * rng.uniform(*DOT_CONTRAST)
    canvas = np.broadcast_to(canvas[..., None], (height, width, 3))
    paint = np.array(COLOURS[told.colour]) + rng.uniform(-12, 12, size=3)

    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index, (centre_x, centre_y) in enumerate(centres):
        cover = shape_coverage(told.shape, centre_x, centre_y, radius, height, width)[..., None]
        clip[index] = np.clip(np.rint(canvas * (1 - cover) + paint * cover), 0, 255)
    return clip


SMALLEST_AREA, LARGEST_AREA = 170, 900
SHAPE_MATCH, SHAPE_MATCH_WORST = 0.80, 0.60
SLOW, FAST = (4.5, 16.5), (18.5, 36.0)  # pixels between the first and the last frame


def judge(clip: np.ndarray) -> Seen:
    """Describe a clip, uint8 RGB [T, H, W, 3]."""
    seen = look(clip, (SMALLEST_AREA, LARGEST_AREA), SHAPE_MATCH, SHAPE_MATCH_WORST)
    if seen is None:
        return Seen(None, None, None, None)
    motion, speed = _motion(seen.path * REFERENCE_SIDE / min(clip.shape[1:3]))
    return Seen(seen.colour, seen.shape, motion, speed)


def _motion(path: np.ndarray) -> tuple[str | None, str | None]:
    """Name and speed of the motion along centroids [T, 2] (y, x), in pixels of a 64-pixel frame."""
    travel = np.abs(path[-1] - path[0]).max()
    if np.ptp(path, axis=0).max() < SLOW[0]:
        return STILL, None
    speeds = (("slowly", SLOW), ("fast", FAST))
    speed = next((name for name, (low, high) in speeds if low <= travel <= high), None)
    if speed is None:
        return None, None
    # The direction alone, which `motion_of` reads off longer ways.
    motion = motion_of(path * (2 * MOVING / travel), 1.0)
    return motion, speed if motion else None


def travel_of(clip: np.ndarray) -> float | None:
    """How far the object goes from the first to the last frame, in pixels of a 64-pixel frame;
    None where there is none in both."""
    scale = min(clip.shape[1:3]) / REFERENCE_SIDE
    first, last = object_mask(clip[0]), object_mask(clip[-1])
    if min(first.sum(), last.sum()) < SMALLEST_AREA * scale**2 / 2:
        return None
    return float(np.abs(centroid(last) - centroid(first)).max() / scale)
