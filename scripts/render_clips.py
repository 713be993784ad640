"""The synthetic world: one coloured shape that moves (or not) over a plain background.

Sixty captions, "a {colour} {shape} {motion}", each rendered from a seed into a short clip.
Imported as a function (`render_clip`), or run to write a dataset of mp4 files:

    python scripts/render_clips.py --output /tmp/clips --count 60
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Far apart in hue, so that a blurred reconstruction keeps its colour name. RGB, 0..255.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 185, 60),
    "blue": (45, 80, 230),
    "yellow": (235, 210, 45),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
# Unit direction (x, y) in image coordinates: y grows downwards.
MOTIONS: dict[str, tuple[int, int]] = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "standing still": (0, 0),
}
# A motion that the toy models were never shown: for LoRAs that teach them something new. (A new
# colour would not do: their VAE paints purple blue.)
NEW_MOTIONS: dict[str, tuple[int, int]] = {"moving diagonally": (1, 1)}
ALL_MOTIONS = MOTIONS | NEW_MOTIONS


def _captions(motions: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    return tuple(f"a {c} {s} {m}" for c, s, m in itertools.product(COLOURS, SHAPES, motions))


CAPTIONS, NEW_CAPTIONS = _captions(MOTIONS), _captions(NEW_MOTIONS)

# Lengths are in pixels of a frame whose shorter side is 64; other sizes scale with it.
REFERENCE_SIDE = 64
RADIUS = (12.0, 15.0)
TRAVEL = (18.0, 24.0)
# Relative to `radius`. The square is nearly as wide as the circle, so that what tells them
# apart is the corners; the triangle is larger, so that its area does not look like a dot.
SQUARE_HALF_SIDE = 0.95
TRIANGLE_CIRCUMRADIUS = 1.4
SUPPORT = 1.25  # no shape reaches further than this times `radius` from its box's centre


def parse_caption(caption: str) -> tuple[str, str, str]:
    """Split a caption into (colour, shape, motion); ValueError for one not of this world."""
    words = caption.split(" ", 3)
    if len(words) == 4 and words[0] == "a":
        _, colour, shape, motion = words
        if colour in COLOURS and shape in SHAPES and motion in ALL_MOTIONS:
            return colour, shape, motion
    raise ValueError(f"not a caption of this world: {caption!r}")


def shape_coverage(
    shape: str, centre_x: float, centre_y: float, radius: float, height: int, width: int
) -> np.ndarray:
    """Coverage of every pixel by the shape: float64 [H, W] in 0..1, edges one pixel soft.

    The centre is that of the shape's bounding box, in pixels (pixel i spans i..i+1).
    """
    x = np.arange(width)[None, :] + 0.5 - centre_x
    y = np.arange(height)[:, None] + 0.5 - centre_y
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius
    elif shape == "triangle":
        # Equilateral, tip up: three half planes, each one inradius from the centroid, which
        # lies half an inradius below the middle of the triangle's height.
        inradius = TRIANGLE_CIRCUMRADIUS * radius / 2
        y = y - inradius / 2
        slope_x, slope_y = np.sqrt(3) / 2, 0.5
        sides = (y, slope_x * x - slope_y * y, -slope_x * x - slope_y * y)
        distance = np.maximum.reduce(np.broadcast_arrays(*sides)) - inradius
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def render_clip(
    caption: str, seed: int, frames: int = 17, height: int = 64, width: int = 64
) -> np.ndarray:
    """Render a caption: uint8 RGB [T, H, W, 3], a pure function of its arguments.

    The whole object stays inside the frame, and its travel is spread over the whole clip,
    whatever the number of frames.
    """
    colour, shape, motion = parse_caption(caption)
    rng = np.random.default_rng([seed, (CAPTIONS + NEW_CAPTIONS).index(caption)])
    scale = min(height, width) / REFERENCE_SIDE
    radius = rng.uniform(*RADIUS) * scale
    travel = rng.uniform(*TRAVEL) * scale
    direction = np.array(ALL_MOTIONS[motion], dtype=np.float64)

    # The middle of the path, such that both of its ends are inside.
    margin = SUPPORT * radius + np.abs(direction) * travel / 2
    middle = rng.uniform(margin, np.array([width, height]) - margin)
    progress = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    centres = middle + progress[:, None] * direction * travel  # [T, 2], (x, y)

    # A grey level with a slight tint and a slight vertical gradient.
    background = rng.uniform(25, 85) + rng.uniform(-6, 6, size=3)
    gradient = rng.uniform(-8, 8) * np.linspace(-0.5, 0.5, height)
    canvas = np.broadcast_to(background + gradient[:, None, None], (height, width, 3))
    paint = np.array(COLOURS[colour]) + rng.uniform(-12, 12, size=3)

    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index, (centre_x, centre_y) in enumerate(centres):
        cover = shape_coverage(shape, centre_x, centre_y, radius, height, width)[..., None]
        clip[index] = np.clip(np.rint(canvas * (1 - cover) + paint * cover), 0, 255)
    return clip


def write_mp4(path: Path, clip: np.ndarray, fps: int) -> None:
    """Write uint8 [T, H, W, 3] as H.264, near lossless.

    yuv444p keeps the colour of the edges. The matrix is BT.601, which is what readers assume of
    a small file that says nothing.
    """
    import imageio_ffmpeg

    height, width = clip.shape[1:3]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv444p",
        macro_block_size=1,
        quality=None,
        output_params=["-crf", "4", "-preset", "veryfast"],
    )
    writer.send(None)
    for frame in clip:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def write_dataset(
    output: Path,
    count: int,
    seed: int,
    frames: int,
    height: int,
    width: int,
    fps: int,
    captions: tuple[str, ...] = CAPTIONS,
    render: Callable[..., np.ndarray] = render_clip,
) -> list[dict[str, str | int]]:
    """Render `count` clips, going through the captions in turn; return the metadata written."""
    output.mkdir(parents=True, exist_ok=True)
    metadata: list[dict[str, str | int]] = []
    for index in range(count):
        caption = captions[index % len(captions)]
        name = f"{index:05d}.mp4"
        clip = render(caption, seed + index, frames, height, width)
        write_mp4(output / name, clip, fps)
        metadata.append(
            {"file_path": name, "text": caption, "type": "video", "width": width, "height": height}
        )
    (output / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for mp4 and metadata")
    parser.add_argument("--count", type=int, default=60, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip")
    parser.add_argument("--frames", type=int, default=17, help="frames per clip")
    parser.add_argument("--size", default="64", help="side in pixels, or WIDTHxHEIGHT")
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--new", action="store_true", help="the captions that the toy never saw")
    args = parser.parse_args()
    sides = [int(side) for side in args.size.split("x")]
    width, height = sides[0], sides[-1]
    captions = NEW_CAPTIONS if args.new else CAPTIONS
    write_dataset(
        args.output, args.count, args.seed, args.frames, height, width, args.fps, captions
    )
    print(f"{args.count} clips of {width}x{height}x{args.frames} in {args.output}")


if __name__ == "__main__":
    main()
