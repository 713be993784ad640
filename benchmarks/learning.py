"""Does distillation work? The toy distilled through `wantrain`, measured against its teacher.

    python benchmarks/learning.py full             # t2v, one LoRA for all steps: the main table
    python benchmarks/learning.py renoise          # the same with re-noised steps, longer
    python benchmarks/learning.py experts          # t2v, high and low apart, sampled together
    python benchmarks/learning.py i2v
    python benchmarks/learning.py recipes          # the seed's maths and other choices, per expert
    python benchmarks/learning.py ema              # the average over the path beside its last point
    python benchmarks/learning.py fm               # flow matching on real latents beside DMD
    python benchmarks/learning.py full --quick     # a minute: does it run at all?

Everything is kept under --work and done once: run it again, after an interruption or with more
--updates or --seeds, and it does what is missing. The rows are

    a  teacher, 40 steps, CFG, with other noise than the reference: the floor of the distance
    b  teacher, 4 steps, CFG
    c  teacher, 4 steps, no CFG: the student before its first update
    d  student, 4 steps, no CFG, after so many generator updates

each with mean and standard error over the seeds. Seed s trains and samples with numbers of its own;
rows of one seed share their noise, so differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Tiny tensors gain nothing from threads; two processes of one thread each use two cores fully.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from toy_students import (
    ROOT,
    Sampler,
    ToyBench,
    TwoExperts,
    even_steps,
    mean_and_error,
    sliced_wasserstein,
)

FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)
RANK, ALPHA = 32, 32
# The toy's own recipe: it is small, so it takes large steps on large batches. Score levels
# are drawn one by one, as when the tables of docs/results.md were measured.
RECIPE = (
    "--mixed-precision no --no-gradient-checkpointing --dataloader-num-workers 0 "
    f"--rank {RANK} --network-alpha {ALPHA} --train-batch-size 32 --learning-rate %s "
    "--learning-rate-critic 2e-3 --adam-beta1 0 --max-grad-norm 1 --no-uniform-sampling"
)
REFERENCE_SEED = 1000
MANY_SHIFT = 5.0  # of the teacher at many steps, where the shift matters little


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train one expert: `wantrain distill` with these flags beside RECIPE."""

    expert: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table: students, each made of one arm (full) or two (high, low)."""

    model: str
    guidance: float
    """CFG scale of the teacher, as reference."""
    shift: float
    """Of the few steps; the reference takes its many steps at shift 5."""
    students: dict[str, tuple[Arm, ...]]
    updates: tuple[int, ...]
    """Generator updates after which the students are measured."""
    loss_guidance: float | None = None
    """CFG scale of the teacher in the DMD loss, where it is not `guidance`."""
    learning_rate: str = "5e-4"
    """Of the generator. Twice the rate reaches the same in half the updates, then overshoots."""
    averaged: bool = False
    """Measure the average (--ema-decay in the arm's flags) of each student, too."""
    captions: int = 512
    clips: int = 480
    """Renders in the training cache."""
    teacher_steps: int = 40


FULL, HIGH, LOW = Arm(expert="full"), Arm(expert="high"), Arm(expert="low")
HIGH_SEED = replace(HIGH, flags=("--recipe", "seed"))
LOW_SEED = replace(LOW, flags=("--recipe", "seed"))
EULER = ("--pairing", "euler")
EXPERIMENTS = {
    "full": Experiment(
        model="toy",
        guidance=2,
        loss_guidance=1.25,
        shift=12,
        students={"d": (replace(FULL, flags=EULER),)},
        updates=(10, 20, 30),
        learning_rate="2e-4",
    ),
    "renoise": Experiment(
        model="toy",
        guidance=2,
        shift=12,
        students={"d": (FULL,)},
        updates=(10, 20, 30, 40),
        learning_rate="2e-4",
    ),
    "experts": Experiment(
        model="toy", guidance=2, shift=12, students={"d": (HIGH, LOW)}, updates=(5, 10)
    ),
    "ema": Experiment(
        model="toy",
        guidance=2,
        loss_guidance=1.25,
        shift=12,
        students={"d": (replace(FULL, flags=(*EULER, "--ema-decay", "0.8", "--ema-start", "5")),)},
        updates=(10, 20, 30),
        averaged=True,
    ),
    "fm": Experiment(
        model="toy",
        guidance=2,
        loss_guidance=1.25,
        shift=12,
        students={
            "DMD alone": (replace(FULL, flags=EULER),),  # the very runs of `full`
            "+ 0.1 flow matching": (replace(FULL, flags=(*EULER, "--fm-loss-weight", "0.1")),),
            "+ 0.5 flow matching": (replace(FULL, flags=(*EULER, "--fm-loss-weight", "0.5")),),
        },
        updates=(10, 20),
        learning_rate="2e-4",
    ),
    "i2v": Experiment(
        model="toy-i2v",
        guidance=2,
        loss_guidance=1.25,
        shift=5,
        students={"d": (FULL,)},
        updates=(10, 20),
        learning_rate="2e-4",
    ),
    "recipes": Experiment(
        model="toy",
        guidance=2,
        shift=12,
        students={
            "both corrected": (HIGH, LOW),
            "both seed": (HIGH_SEED, LOW_SEED),
            "high seed": (HIGH_SEED, LOW),
            "low seed": (HIGH, LOW_SEED),
            "high to the hand-over": (replace(HIGH, flags=("--score-floor", "handover")), LOW),
            "low from noise": (HIGH, replace(LOW, flags=("--start", "noise"))),
            "both Euler": (replace(HIGH, flags=EULER), replace(LOW, flags=EULER)),
        },
        updates=(10,),
    ),
}


def quick(experiment: Experiment) -> Experiment:
    """The same code in about a minute; its numbers mean nothing."""
    return replace(experiment, updates=(1, 2), captions=12, clips=60, teacher_steps=4)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One set of latents to be made and measured: a teacher's, or a student's checkpoint."""

    model: str
    captions: int
    sampler: Sampler
    seed: int
    loras: tuple[tuple[str, str, float], ...] = ()
    """(expert, checkpoint's weight file, alpha / rank); none for the teacher."""
    file: str
    """Where the latents go; the accuracy stands in the metadata of a file beside it."""


@cache
def _bench(model: str, captions: int) -> ToyBench:
    torch.set_num_threads(1)
    return ToyBench(model, captions)


def make_draw(draw: Draw) -> None:
    """Sample, judge and keep; done once."""
    file = Path(draw.file)
    if file.with_suffix(".json").exists():
        return
    bench = _bench(draw.model, draw.captions)
    loras = {expert: (Path(path), scale) for expert, path, scale in draw.loras}
    transformer: Any
    if "full" in loras or not loras:
        transformer = bench.transformer(loras.get("full"))
    else:
        high, low = (bench.transformer(loras[expert]) for expert in ("high", "low"))
        transformer = TwoExperts(high, low, bench.boundary)
    latents = bench.draw(transformer, draw.sampler, draw.seed)
    save_file({"latents": latents}, file)
    # Written last and renamed: where it is, both are whole.
    measured = json.dumps({"accuracy": bench.accuracy(latents)})
    file.with_suffix(".tmp").write_text(measured)
    file.with_suffix(".tmp").rename(file.with_suffix(".json"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """One `wantrain distill` run."""

    command: tuple[str, ...]
    folder: str
    updates: int


def make_training(training: Training) -> None:
    """Run or resume it; done once."""
    folder = Path(training.folder)
    if (folder / f"checkpoint-{training.updates}").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (folder / "run.log").open("a") as log:
        subprocess.run(training.command, check=True, stdout=log, stderr=log)
    print(f"trained {folder.name} in {time.monotonic() - started:.0f} s", flush=True)


def make(job: Training | Draw) -> None:
    """Do one job in a worker process."""
    if isinstance(job, Training):
        make_training(job)
    else:
        make_draw(job)


def console_script(name: str) -> str:
    """The installed command beside this Python."""
    return str(Path(sys.executable).with_name(name))


def short_digest(value: object) -> str:
    """Eight hex digits of a value's repr: what decides a file's content is in its name."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def make_shards(model: str, clips: int, work: Path, *, new: bool = False) -> Path:
    """Render and encode the training clips, once; `new`: of what the toy was never shown."""
    kind = "-new" if new else ""
    shards = work / f"shards-{model}-{clips}{kind}"
    if not (shards / "index.zarr").exists():
        media = work / f"media-{clips}{kind}"
        render = [sys.executable, str(ROOT / "scripts" / "render_clips.py")]
        subprocess.run(
            [
                *render, "--output", str(media), "--count", str(clips), "--seed", "5000",
                *(["--new"] if new else []),
            ],
            check=True,
        )  # fmt: skip
        encode = (
            f"encode --model {model} --train-data-dir {media} --output {shards} --size 64 "
            "--video-sample-n-frames 17 --video-sample-stride 1"
        )
        subprocess.run(
            [console_script("wanprep"), *encode.split(), "--negative-prompt", ""], check=True
        )
    return shards


class Bench:
    """The jobs of one experiment, and the files that they leave."""

    def __init__(self, experiment: Experiment, seeds: int, work: Path) -> None:
        self.experiment, self.seeds, self.work = experiment, range(seeds), work
        self.shards = make_shards(experiment.model, experiment.clips, work)
        self.weights = ToyBench(experiment.model, 1).folder.name  # carries a digest

    def training(self, arm: Arm, seed: int) -> Training:
        one = self.experiment
        flags = (
            "--model", one.model, "--shards", str(self.shards), "--boundary-type", arm.expert,
            "--seed", str(seed), "--flow-shift", str(one.shift),
            "--real-guidance-scale", str(one.loss_guidance or one.guidance),
            *(RECIPE % one.learning_rate).split(),
            *arm.flags,
        )  # fmt: skip
        name = "-".join([arm.expert, *(flag.lstrip("-") for flag in arm.flags)])
        folder = self.work / "runs" / f"{name}-{short_digest((self.weights, flags))}"
        every = math.gcd(*one.updates)
        command = (
            console_script("wantrain"), "distill", *flags, "--output-dir", str(folder),
            "--max-train-steps", str(max(one.updates)), "--checkpointing-steps", str(every),
            "--resume-from-checkpoint", "latest",
        )  # fmt: skip
        return Training(command=command, folder=str(folder), updates=max(one.updates))

    def _draw(self, sampler: Sampler, seed: int, loras: tuple[Any, ...] = ()) -> Draw:
        one = self.experiment
        told = (self.weights, one.captions, sampler, seed, loras)
        file = self.work / "latents" / f"{short_digest(told)}.safetensors"
        return Draw(
            model=one.model, captions=one.captions, sampler=sampler, seed=seed, loras=loras,
            file=str(file),
        )  # fmt: skip

    def many_steps(self, seed: int) -> Draw:
        one = self.experiment
        steps = even_steps(one.teacher_steps)
        return self._draw(Sampler(indices=steps, shift=MANY_SHIFT, guidance=one.guidance), seed)

    def few_steps(self, seed: int, *, guidance: float, renoise: bool) -> Draw:
        one = self.experiment
        sampler = Sampler(indices=FEW_STEPS, shift=one.shift, guidance=guidance, renoise=renoise)
        return self._draw(sampler, seed)

    def student(
        self, seed: int, *, arms: tuple[Arm, ...], updates: int, weights: str = "generator_weights"
    ) -> Draw:
        renoise = not any(EULER[1] in arm.flags for arm in arms)
        sampler = Sampler(indices=FEW_STEPS, shift=self.experiment.shift, renoise=renoise)
        loras = tuple(
            (
                arm.expert,
                f"{self.training(arm, seed).folder}/checkpoint-{updates}/{weights}.safetensors",
                ALPHA / RANK,
            )
            for arm in arms
        )
        return self._draw(sampler, seed, loras)

    def rows(self) -> dict[str, Callable[[int], Draw]]:
        """Label → the draw of a seed."""
        one = self.experiment
        euler = {name: EULER[1] in arms[0].flags for name, arms in one.students.items()}
        suffixes = {False: "", True: " (Euler)"}
        rows: dict[str, Callable[[int], Draw]] = {
            f"a  teacher, {one.teacher_steps} steps, CFG {one.guidance:g}": self.many_steps
        }
        for stepping in sorted(set(euler.values())):
            for letter, what, guidance in (
                ("b", f"CFG {one.guidance:g}", one.guidance),
                ("c", "no CFG", 1.0),
            ):
                rows[f"{letter}  teacher, 4 steps, {what}{suffixes[stepping]}"] = partial(
                    self.few_steps, guidance=guidance, renoise=not stepping
                )
        for name, arms in one.students.items():
            for updates in one.updates:
                label = f"d  student, {updates} updates{suffixes[euler[name]]}"
                if name != "d":
                    label += f": {name}"
                rows[label] = partial(self.student, arms=arms, updates=updates)
                if one.averaged:
                    rows[f"{label}: average"] = partial(
                        self.student, arms=arms, updates=updates, weights="generator_ema"
                    )
        return rows

    def trainings(self) -> list[Training]:
        arms = dict.fromkeys(arm for arms in self.experiment.students.values() for arm in arms)
        return [self.training(arm, seed) for seed in self.seeds for arm in arms]


def run_all(jobs: Iterable[Training | Draw], processes: int) -> None:
    """Do the jobs, `processes` at a time; the first failure ends it."""
    # spawn: a forked child of a process that has used torch may hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(make, jobs):
            pass


def measure(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """Row → accuracy and distance of each seed."""
    reference = load_file(bench.many_steps(REFERENCE_SEED).file)["latents"]
    table: dict[str, dict[str, list[float]]] = {}
    for label, draw_of in bench.rows().items():
        draws = [draw_of(seed) for seed in bench.seeds]
        table[label] = {
            "accuracy": [
                json.loads(Path(d.file).with_suffix(".json").read_text())["accuracy"] for d in draws
            ],
            "distance": [
                sliced_wasserstein(load_file(d.file)["latents"], reference) for d in draws
            ],
        }
    return table


def markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """The table for people, students with their distance from row c in standard errors."""
    lines = [
        "| | caption accuracy | distance to the teacher | against c: accuracy | distance |",
        "|---|---|---|---|---|",
    ]
    for label, row in table.items():
        cells = []
        for metric in ("accuracy", "distance"):
            mean, error = mean_and_error(row[metric])
            cells.append(f"{mean:.3f} ± {error:.3f}")
        if not label.startswith("d "):
            lines.append(f"| {label} | {' | '.join(cells)} | | |")
            continue
        euler = "Euler" in label
        base = next(
            name for name in table if name.startswith("c ") and (("(Euler)" in name) == euler)
        )
        for metric in ("accuracy", "distance"):
            pairs = zip(row[metric], table[base][metric], strict=True)
            mean, error = mean_and_error([a - b for a, b in pairs])
            counted = f" ({mean / error:+.1f} SE)" if error > 1e-9 else ""
            cells.append(f"{mean:+.3f}{counted}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, nargs="+", help="generator updates to measure after")
    parser.add_argument("--guidance", type=float, help="the teacher's CFG scale")
    parser.add_argument("--shift", type=float, help="of the few steps")
    parser.add_argument("--flags", default="", help="more of wantrain's, for every arm")
    parser.add_argument("--captions", type=int, help="clips of each row and seed")
    parser.add_argument("--quick", action="store_true", help="tiny; the numbers mean nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    args = parser.parse_args()
    started = time.monotonic()

    experiment = EXPERIMENTS[args.experiment]
    if args.quick:
        experiment, args.seeds = quick(experiment), min(args.seeds, 2)
    if args.updates:
        experiment = replace(experiment, updates=tuple(sorted(args.updates)))
    for name in ("guidance", "shift", "captions"):
        if getattr(args, name) is not None:
            experiment = replace(experiment, **{name: getattr(args, name)})
    if args.flags:
        students = {
            name: tuple(replace(arm, flags=(*arm.flags, *args.flags.split())) for arm in arms)
            for name, arms in experiment.students.items()
        }
        experiment = replace(experiment, students=students)

    (args.work / "latents").mkdir(parents=True, exist_ok=True)
    bench = Bench(experiment, args.seeds, args.work.resolve())
    rows = bench.rows()
    draws = [draw_of(seed) for draw_of in rows.values() for seed in bench.seeds]
    teachers = [draw for draw in draws if not draw.loras]
    students = [draw for draw in draws if draw.loras]
    reference = bench.many_steps(REFERENCE_SEED)
    run_all([*bench.trainings(), reference, *teachers], args.processes)
    run_all(students, args.processes)

    table = measure(bench)
    result = {"seeds": args.seeds, "captions": experiment.captions, "rows": table}
    (args.work / f"{args.experiment}.json").write_text(json.dumps(result, indent=2))
    print(markdown(table))
    print(f"\n{time.monotonic() - started:.0f} s on {args.processes} processes of one thread")


if __name__ == "__main__":
    main()
