"""Do decoding, resizing and writing hide behind the encoders? Wall time over encoder time.

    python benchmarks/encode_overlap.py                  # generates media, encodes, judges
    python benchmarks/encode_overlap.py --keep DIR       # keeps the media there for another run

Runs the real `wanprep encode` (bundled toy model, i2v: latents and a condition) on a folder of
large JPEGs and mp4 clips with one thread for the encoder, so that on two cores a decoder has the
other. Prints where the wall time of the media pass went, and its ratio to the time inside the
encoders. Exits with 1 above the goal, and with 2 where the run says nothing: the encoder must
take at least 200 ms a sample and decoding at least 100 ms, else there is too little to hide or
too little to hide it behind.

On a machine that does other work too, the ratio is that of the machine: decoders that get no core
can't be ahead.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
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


def make_media(folder: Path, images: int, videos: int) -> None:
    """JPEGs of 12 megapixels and mp4 clips of 1280 × 720, with captions; those there are kept."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(max(images, videos)):
        texture = random.integers(0, 256, (90, 160, 3), dtype=np.uint8)
        image, video = folder / f"{number:03d}.jpg", folder / f"{number:03d}-v.mp4"
        if number < images and not image.exists():
            Image.fromarray(texture).resize((4000, 3000), Image.Resampling.BICUBIC).save(
                image, quality=95
            )
        if number < videos and not video.exists():
            frame = np.asarray(Image.fromarray(texture).resize((1280, 720)))
            writer = imageio_ffmpeg.write_frames(
                str(video), (1280, 720), fps=16, codec="libx264", output_params=["-preset", "fast"]
            )
            writer.send(None)
            for shift in range(FRAMES):
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
    parser.add_argument("--size", type=int, default=320, help="as of wanprep encode, pixels")
    parser.add_argument("--workers", type=int, default=1, help="decoders (--num-workers)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the media stay")
    args = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overlap-")))
        media = args.keep or work / "media"
        make_media(media, args.images, args.videos)
        command = [
            Path(sys.executable).with_name("wanprep"), "encode", "--model", "toy-i2v",
            "--train-data-dir", media, "--output", work / "shards", "--size", args.size,
            "--video-sample-n-frames", FRAMES, "--video-sample-stride", 1, "--device", "cpu",
            "--num-workers", args.workers, "--shard-size-mb", 4,
        ]  # fmt: skip
        own = {"PYTHONPATH": str(Path(__file__).parents[1])}  # this checkout is measured
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(
            list(map(str, command)), env=os.environ | threads | own, capture_output=True, text=True
        )
    found = _NUMBERS.search(" ".join(ran.stderr.split()))
    if ran.returncode or found is None:
        print(ran.stdout + ran.stderr)
        return 2
    wall, encoders, decoders, disk, rest, encode, decode = map(float, found.groups())
    print(f"{args.images} images of 12 megapixels, {args.videos} clips of 1280 × 720 × {FRAMES},")
    print(f"at size {args.size}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    rows = {
        "wall time of the media pass": wall,
        "  in the encoders": encoders,
        "  waiting for decoders": decoders,
        "  waiting for the disk": disk,
        "  else": rest,
        "encoder, a sample": encode,
        "decoding and resizing, a sample, in the workers": decode,
    }
    for name, seconds in rows.items():
        print(f"{name:<50}{seconds:8.2f} s")
    if encode < LEAST_ENCODE or decode < LEAST_DECODE:
        print(f"\nsays nothing: expected at least {LEAST_ENCODE} s and {LEAST_DECODE} s a sample")
        return 2
    ratio = wall / encoders
    verdict = "reached" if ratio <= GOAL else "missed"
    print(f"\nwall / encoders: {ratio:.3f} (goal ≤ {GOAL}: {verdict})")
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
