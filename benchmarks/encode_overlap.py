"""Do decoding, resizing and writing hide behind the encoders? Wall time over encoder time.

    python benchmarks/encode_overlap.py                  # generates media, encodes, judges
    python benchmarks/encode_overlap.py --keep DIR       # keeps the media there for another run
    python benchmarks/encode_overlap.py --codec vp9 --beside ../other --rounds 3

Runs the real `wanprep encode` (bundled toy model, i2v: latents and a condition) on a folder of
large JPEGs and clips of 1280 × 720 (H.264, HEVC in mp4, VP9 in WebM) with one thread for the
encoder, so that on two cores a decoder has the other. Prints where the wall time of the media pass
went, and its ratio to the time inside the encoders. Exits with 1 above the goal, and with 2 where
the run says nothing: the encoder must take at least 200 ms a sample and decoding at least 100 ms,
else there is too little to hide or too little to hide it behind.

`--beside` takes another checkout of wandistill (`git worktree add ../other COMMIT`) and runs both
in turns, on the same media: looking into the media (`wanprep plan`, nothing remembered) and
decoding, as ratios of this checkout to the other.

On a machine that does other work too, the ratio is that of the machine: decoders that get no core
can't be ahead.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

GOAL = 1.05
LEAST_ENCODE, LEAST_DECODE = 0.2, 0.1
_NUMBERS = re.compile(
    r"time\s+media (\S+) s: in the encoders (\S+), waiting for decoders (\S+), for the disk (\S+),"
    r" else (\S+); a clip (\S+) s to encode, beside it (\S+) s to decode"
)


_ENCODERS = {
    "h264": (".mp4", "libx264", ["-preset", "fast"]),
    "hevc": (".mp4", "libx265", ["-preset", "fast", "-x265-params", "log-level=none"]),
    "vp9": (".webm", "libvpx-vp9", ["-deadline", "realtime", "-cpu-used", "8"]),
}


def make_media(folder: Path, images: int, videos: int, codec: str, frames: int) -> None:
    """JPEGs of 12 megapixels and clips of 1280 × 720, with captions; those there are kept."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    ending, encoder, options = _ENCODERS[codec]
    for number in range(max(images, videos)):
        texture = random.integers(0, 256, (90, 160, 3), dtype=np.uint8)
        image, video = folder / f"{number:03d}.jpg", folder / f"{number:03d}-v{ending}"
        if number < images and not image.exists():
            Image.fromarray(texture).resize((4000, 3000), Image.Resampling.BICUBIC).save(
                image, quality=95
            )
        if number < videos and not video.exists():
            frame = np.asarray(Image.fromarray(texture).resize((1280, 720)))
            writer = imageio_ffmpeg.write_frames(
                str(video), (1280, 720), fps=16, codec=encoder, output_params=options
            )
            writer.send(None)
            for shift in range(frames):
                writer.send(np.ascontiguousarray(np.roll(frame, 8 * shift, axis=1)))
            writer.close()
        for media in (image, video):
            if media.exists():
                media.with_suffix(".txt").write_text(f"texture {media.stem}")


FRAMES = 17
"""Of a clip; all are taken."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--codec", choices=list(_ENCODERS), default="h264", help="of the clips")
    parser.add_argument("--frames", type=int, default=FRAMES, help="in each file; 17 are taken")
    parser.add_argument("--size", type=int, default=320, help="as of wanprep encode, pixels")
    parser.add_argument("--workers", type=int, default=1, help="decoders (--num-workers)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the media stay")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout, to compare")
    parser.add_argument("--rounds", type=int, default=1, help="how often, with --beside")
    args = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overlap-")))
        media = args.keep or work / "media"
        make_media(media, args.images, args.videos, args.codec, args.frames)
        if args.beside is not None:
            return compare(args, media, work)
        found = run(args, HERE, media, work)
    if found is None:
        return 2
    print(f"{args.images} images of 12 megapixels, {args.videos} clips of 1280 × 720 × {FRAMES},")
    print(f"at size {args.size}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    rows = {
        "wall time of the media pass": found.wall,
        "  in the encoders": found.encoders,
        "  waiting for decoders": found.decoders,
        "  waiting for the disk": found.disk,
        "  else": found.rest,
        "encoder, a sample": found.encode,
        "decoding and resizing, a sample, in the workers": found.decode,
    }
    for name, seconds in rows.items():
        print(f"{name:<50}{seconds:8.2f} s")
    if found.encode < LEAST_ENCODE or found.decode < LEAST_DECODE:
        print(f"\nsays nothing: expected at least {LEAST_ENCODE} s and {LEAST_DECODE} s a sample")
        return 2
    ratio = found.wall / found.encoders
    verdict = "reached" if ratio <= GOAL else "missed"
    print(f"\nwall / encoders: {ratio:.3f} (goal ≤ {GOAL}: {verdict})")
    return 0 if ratio <= GOAL else 1


HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Found:
    """What one `wanprep encode` says of its media pass, seconds; the last two are of a sample."""

    wall: float
    encoders: float
    decoders: float
    disk: float
    rest: float
    encode: float
    decode: float


def command(args: argparse.Namespace, name: str, media: Path, output: Path) -> list[str]:
    return list(
        map(
            str,
            [
                *(Path(sys.executable).with_name("wanprep"), name, "--model", "toy-i2v"),
                *("--train-data-dir", media, "--output", output, "--size", args.size),
                *("--video-sample-n-frames", FRAMES, "--video-sample-stride", 1),
                *("--device", "cpu", "--num-workers", args.workers, "--shard-size-mb", 4),
                *("--clips", "first"),
            ],
        )
    )


def environment(checkout: Path, memory: Path) -> dict[str, str]:
    """One thread for the encoder; the code of a checkout; nothing remembered but in `memory`."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own = {"PYTHONPATH": str(checkout), "WANDISTILL_CACHE": str(memory)}
    return os.environ | threads | own


def run(args: argparse.Namespace, checkout: Path, media: Path, work: Path) -> Found | None:
    """Encode; None, with what was printed, where it went wrong."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        ran = subprocess.run(
            command(args, "encode", media, Path(name) / "shards"),
            env=environment(checkout, Path(name) / "memory"),
            capture_output=True,
            text=True,
        )
    found = _NUMBERS.search(" ".join(ran.stderr.split()))
    if ran.returncode or found is None:
        print(ran.stdout + ran.stderr)
        return None
    return Found(*map(float, found.groups()))


def looking(args: argparse.Namespace, checkout: Path, media: Path, work: Path) -> float:
    """Seconds of `wanprep plan`: start-up, digests, and a look into every file."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        began = time.perf_counter()
        subprocess.run(
            command(args, "plan", media, Path(name) / "shards"),
            env=environment(checkout, Path(name) / "memory"),
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - began


def compare(args: argparse.Namespace, media: Path, work: Path) -> int:
    """This checkout beside another, in turns."""
    rows: dict[str, list[tuple[float, float]]] = {"looking into the media": []}
    names = ("decode", "encode", "wall")
    rows |= {name: [] for name in names}
    for _ in range(args.rounds):
        rows["looking into the media"].append(
            (looking(args, HERE, media, work), looking(args, args.beside, media, work))
        )
        pair = [run(args, checkout, media, work) for checkout in (HERE, args.beside)]
        ours, other = pair
        if ours is None or other is None:
            return 2
        for name in names:
            rows[name].append((getattr(ours, name), getattr(other, name)))
        print(f"wall / encoders: {ours.wall / ours.encoders:.3f} here, "
              f"{other.wall / other.encoders:.3f} there")  # fmt: skip
    print(f"\n{args.videos} clips of {args.frames} frames ({args.codec}), {args.images} images; "
          f"load {os.getloadavg()[0]:.1f}; here / there of {args.rounds} rounds")  # fmt: skip
    for name, pairs in rows.items():
        ratios = sorted(ours / other for ours, other in pairs)
        middle = ratios[len(ratios) // 2]
        print(f"{name:<24}{middle:6.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f}; "
              f"{pairs[-1][0]:.2f} s and {pairs[-1][1]:.2f} s)")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
