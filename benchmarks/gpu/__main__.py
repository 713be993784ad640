"""Wan on one GPU, in minutes: numerics, speed, and memory beside what `wantrain plan` says.

    python benchmarks/gpu --minutes 5 --json found.json   # the first thing to run on a new card
    python benchmarks/gpu --levers                        # what each speed option does, 8 blocks
    python benchmarks/gpu --vae                           # encoding and decoding by themselves
    python benchmarks/gpu --only 1.3b 1.3b-in-loop        # these steps instead
    python benchmarks/gpu --quick                         # that it runs, tiny, also on a CPU

Steps, most valuable first: `machine` (versions; attention kernel by kernel), `toy` (losses beside
the CPU's), `a14b` (Wan2.2-I2V-A14B's low-noise expert, 832 × 480 × 81, rank 64: a critic and a
generator update after two that warm up), `a14b-block` (kernels of one block), `a14b-low-vram` (the
same with base and activations in CPU memory). Weights are random, made on the card; nothing is
downloaded. Each step is a process of its own with a time cap, and all that is known is written
after each. What the minutes left would not do at full depth is done with 20 or 8 blocks, or left
out; the table says so.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
for folder in (BENCHMARKS, BENCHMARKS.parent):
    sys.path.insert(0, str(folder))
sys.path.remove(str(BENCHMARKS / "gpu"))  # python put it there for this file

from gpu.place import Place  # noqa: E402
from gpu.session import FIRST, LEVERS, STEPS, VAE, Session  # noqa: E402
from gpu.table import report  # noqa: E402
from shared.device import default_device  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that all of it runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all of it")
    parser.add_argument("--levers", action="store_true", help="speed options, 8 blocks each")
    parser.add_argument("--vae", action="store_true", help="the VAE by itself")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--device", default=None, help="cuda where there is one")
    parser.add_argument(
        "--clip", type=Path, metavar="FILE",
        help="a video of 81 frames or more for in-loop training; without one it is made, by ffmpeg",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=_out(),
        help="the numbers, written after each step; $OUT/found.json where OUT is set",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="for 10 GB (in-loop 25); what is made is removed at the end"
    )
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = args.device or default_device()
    if args.step:
        place = Place(
            folder=args.folder, result=args.json, device=device, quick=args.quick,
            layers=args.layers, clip=args.clip,
        )  # fmt: skip
        STEPS[args.step].work(place)
        return
    if device == "cpu" and not args.quick:
        parser.error("there is no GPU here; --quick runs all of it at a tiny size")
    chosen = args.only or [*(LEVERS if args.levers else ()), *(VAE if args.vae else ())] or FIRST
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.folder) as work:
        session = Session(
            folder=Path(work), device=device, quick=args.quick, minutes=args.minutes,
            json_file=args.json, clip=args.clip and args.clip.resolve(),
        )  # fmt: skip
        for name in chosen:
            session.run(name)
    print(report(session.found))
    if any("left out" in session.found[name] for name in chosen):
        sys.exit(1)


def _out() -> Path | None:
    folder = os.environ.get("OUT")
    return Path(folder) / "found.json" if folder else None


if __name__ == "__main__":
    main()
