"""Does `wantrain lora` teach the toy something new, and does it forget what it knew?

    python benchmarks/new_motion.py            # the table
    python benchmarks/new_motion.py --quick    # does it run at all?

The toy knows five motions. Clips of a sixth, "moving diagonally", are rendered and encoded, a plain
LoRA is trained on them through `wantrain lora`, and clips are sampled with the base model's own
sampler (Euler, CFG) with and without it: of the new captions, and of the sixty old ones. Each
share is that of clips whose colour, shape and motion are all those of the caption.

Everything is kept under --work and done once; run it again and it does what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Tiny tensors gain nothing from threads; two processes of one thread each use two cores fully.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from learning import Training, console_script, make_shards, make_training, short_digest
from render_clips import CAPTIONS, NEW_CAPTIONS
from toy_students import Sampler, ToyBench, even_steps, mean_and_error

RANK, ALPHA = 32, 32
RECIPE = (
    "--model toy --boundary-type full --mixed-precision no --no-gradient-checkpointing "
    f"--dataloader-num-workers 0 --rank {RANK} --network-alpha {ALPHA} --train-batch-size 16 "
    "--learning-rate 1e-3 --max-grad-norm 1 --flow-shift 5"
)
SHIFT, GUIDANCE = 5.0, 2.0  # of the sampler


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is made and measured."""

    clips: int = 240
    """Renders of the new captions to train on; of the old ones in `mixed`, too."""
    every: int = 150
    updates: int = 150
    steps: int = 20
    new: int = 96
    """Clips of the new captions that are sampled and judged."""
    old: int = 120
    """Clips of the old captions."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Clips of one kind of captions, with a LoRA or without."""

    kind: str
    """new or old"""
    count: int
    steps: int
    seed: int
    lora: str | None
    """A checkpoint's weight file."""
    file: str


@cache
def _bench(kind: str, count: int) -> ToyBench:
    torch.set_num_threads(1)
    return ToyBench("toy", count, NEW_CAPTIONS if kind == "new" else CAPTIONS)


def measure(one: Measurement) -> float:
    """The share of the clips that are right; sampled and judged once."""
    file = Path(one.file)
    if not file.exists():
        bench = _bench(one.kind, one.count)
        lora = None if one.lora is None else (Path(one.lora), ALPHA / RANK)
        sampler = Sampler(indices=even_steps(one.steps), shift=SHIFT, guidance=GUIDANCE)
        accuracy = bench.accuracy(bench.draw(bench.transformer(lora), sampler, one.seed))
        file.with_suffix(".tmp").write_text(json.dumps(accuracy))
        file.with_suffix(".tmp").rename(file)
    return float(json.loads(file.read_text()))


class Bench:
    """The runs and measurements, and the files that they leave."""

    def __init__(self, size: Size, work: Path, flags: tuple[str, ...]) -> None:
        self.size, self.work = size, work
        self.new = make_shards("toy", size.clips, work, new=True)
        self.old = make_shards("toy", size.clips, work)
        self.weights = ToyBench("toy", 1).folder.name  # carries a digest
        self.flags = (*RECIPE.split(), *flags)

    def training(self, *, mixed: bool, seed: int) -> Training:
        shards = [f"--shards={self.new}", *([f"--shards={self.old}"] if mixed else [])]
        decides = (self.weights, *self.flags, *shards, "--seed", str(seed))
        folder = self.work / "runs" / f"new-motion-{short_digest(decides)}"
        command = (
            console_script("wantrain"), "lora", *self.flags, *shards, "--seed", str(seed),
            "--output-dir", str(folder), "--max-train-steps", str(self.size.updates),
            "--checkpointing-steps", str(self.size.every), "--resume-from-checkpoint", "latest",
        )  # fmt: skip
        return Training(command=command, folder=str(folder), updates=self.size.updates)

    def measurement(self, kind: str, seed: int, *, mixed: bool, updates: int) -> Measurement:
        """Of no updates: the base model."""
        size = self.size
        lora = None
        if updates:
            folder = self.training(mixed=mixed, seed=seed).folder
            lora = f"{folder}/checkpoint-{updates}/lora_weights.safetensors"
        count = size.new if kind == "new" else size.old
        told = (self.weights, kind, count, size.steps, seed, lora, SHIFT, GUIDANCE)
        file = self.work / "latents" / f"new-motion-{short_digest(told)}.json"
        return Measurement(
            kind=kind, count=count, steps=size.steps, seed=seed, lora=lora, file=str(file)
        )


def table(bench: Bench, seeds: int, results: dict[Measurement, float]) -> str:
    """Rows of mean ± standard error over the seeds."""

    def cell(kind: str, *, mixed: bool, updates: int) -> str:
        values = [
            results[bench.measurement(kind, seed, mixed=mixed, updates=updates)]
            for seed in range(seeds)
        ]
        mean, error = mean_and_error(values)
        return f"{mean:.3f} ± {error:.3f}"

    lines = ["| | new captions | old captions |", "|---|---|---|"]
    for label, mixed, updates in rows(bench.size):
        cells = [cell(kind, mixed=mixed, updates=updates) for kind in ("new", "old")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(size: Size) -> list[tuple[str, bool, int]]:
    """(label, trained on old clips too, updates)."""
    found: list[tuple[str, bool, int]] = [("the toy itself", False, 0)]
    for mixed, of in ((False, "new clips alone"), (True, "new and old clips")):
        for updates in range(size.every, size.updates + 1, size.every):
            found.append((f"LoRA of {of}, {updates} updates", mixed, updates))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, help="length of the runs")
    parser.add_argument("--flags", default="", help="more of wantrain's")
    parser.add_argument("--quick", action="store_true", help="tiny; the numbers mean nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    args = parser.parse_args()
    started = time.monotonic()

    size = Size(clips=24, every=1, updates=2, steps=2, new=4, old=4) if args.quick else Size()
    if args.updates:
        size = Size(updates=args.updates)
    (args.work / "latents").mkdir(parents=True, exist_ok=True)
    bench = Bench(size, args.work.resolve(), tuple(args.flags.split()))
    trainings = [
        bench.training(mixed=mixed, seed=seed)
        for seed in range(args.seeds)
        for mixed in (False, True)
    ]
    wanted = [
        bench.measurement(kind, seed, mixed=mixed, updates=updates)
        for _, mixed, updates in rows(size)
        for seed in range(args.seeds)
        for kind in ("new", "old")
    ]
    # spawn: a forked child of a process that has used torch may hang.
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(make_training, trainings))
        results = dict(zip(wanted, pool.map(measure, wanted), strict=True))

    print(table(bench, args.seeds, results))
    print(f"\n{time.monotonic() - started:.0f} s on {args.processes} processes of one thread")


if __name__ == "__main__":
    main()
