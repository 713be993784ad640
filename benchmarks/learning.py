"""Does distillation work? A toy distilled through `wantrain`, measured against its teacher.

    python benchmarks/learning.py recipes          # the harder toy, t2v: both experts, all recipes
    python benchmarks/learning.py recipes-i2v
    python benchmarks/learning.py recipes --seeds 1 --students DMD "w* + levels + decay"
    python benchmarks/learning.py full             # the plain toy, one LoRA for all steps
    python benchmarks/learning.py renoise          # the same with re-noised steps, longer
    python benchmarks/learning.py i2v              # the plain i2v toy
    python benchmarks/learning.py ema              # the average over the path beside its last point
    python benchmarks/learning.py fm               # flow matching on real latents beside DMD
    python benchmarks/learning.py recipes --quick  # a few minutes: does it run at all?

What was measured is kept in --results (benchmarks/results.jsonl, part of the repository), all else
under --work, and each is done once: run it again, after an interruption or with more --updates,
--seeds or --students, and it does what is missing. The rows are

    a  teacher, many steps, CFG, with other noise than the reference: the floor of the distance
    b  teacher, the student's steps (4), CFG
    c  teacher, the student's steps, no CFG: the student before its first update
    d  student, no CFG, after so many generator updates

each with mean and standard error over the seeds. Seed s trains and samples with numbers of its own;
rows of one seed share their noise. Contrast, variety (spread of clips of one caption), between
(spread of captions) and motion (way of the objects that go fast) are ratios to the reference.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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
    WORLDS,
    Sampler,
    ToyBench,
    deviations,
    even_steps,
    mean_and_error,
    render_clips,
    sliced_wasserstein,
)

from train.functional.schedule import Schedule, steps_by_expert

FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)
RANK, ALPHA = 32, 32
# The toy's own recipe: it is small, so it takes large steps on large batches.
RECIPE = (
    "--mixed-precision no --no-gradient-checkpointing --dataloader-num-workers 0 "
    f"--rank {RANK} --network-alpha {ALPHA} --adam-beta1 0 --max-grad-norm 1"
)
CRITIC = ("--learning-rate-critic", "2e-3")
REGRESSION = (
    "--method", "regression", "--shards", "{teacher}", "--adam-beta1", "0.9",
    "--learning-rate", "1e-3", "--train-batch-size", "32", "--ema-decay", "0.98",
)  # fmt: skip
SHORT_TEXT = Path(__file__).with_name("short_text.py")
"""`wantrain`, without the time that a toy's padded text takes."""
REFERENCE_SEED = 1000
MANY_SHIFT = 5.0  # of the teacher at many steps, where the shift matters little


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train one expert: `wantrain distill` with these flags beside RECIPE.

    In flags, "{teacher}" stands for shards of the teacher's own clips with their states,
    "{guidance}" for the guidance that was calibrated on them; made when an arm asks for them.
    """

    expert: str
    flags: tuple[str, ...] = ()

    @property
    def euler(self) -> bool:
        """Whether its student is sampled by Euler steps."""
        return "euler" in self.flags or "regression" in self.flags

    @property
    def averaged(self) -> bool:
        """Whether the average of its path is measured, too."""
        return "--ema-decay" in self.flags

    @property
    def decays(self) -> bool:
        """Whether the length of the run changes its every update."""
        return "--lr-scheduler" in self.flags


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
    batch: int = 32
    uniform_sampling: bool = False
    """As when the tables of the plain toy in docs/results.md were measured."""
    captions: int = 512
    clips: int = 480
    """Renders in the training cache."""
    indices: tuple[float, ...] = FEW_STEPS
    """The student's raw steps in (0, 1000], before the shift."""
    teacher_steps: int = 40
    teacher_clips: int = 120
    """Of the teacher's own, with their states, for the arms that ask for them."""


FULL, HIGH, LOW = Arm(expert="full"), Arm(expert="high"), Arm(expert="low")
EULER = ("--pairing", "euler")
CALIBRATED = ("--guidance", "{guidance}")
LEVELS = ("--score-levels", "exit")
DECAY = ("--lr-scheduler", "warmup_stable_decay")
SEED = ("--recipe", "seed")


def _both(*flags: str) -> tuple[Arm, ...]:
    return tuple(replace(arm, flags=flags) for arm in (HIGH, LOW))


RECIPES = {
    "DMD": _both(),
    "DMD, high alone": (HIGH,),
    "DMD, low alone": (LOW,),
    "DMD, Euler": _both(*EULER),
    "seed": _both(*SEED),
    "high seed": (replace(HIGH, flags=SEED), LOW),
    "low seed": (HIGH, replace(LOW, flags=SEED)),
    "high --score-floor handover": (replace(HIGH, flags=("--score-floor", "handover")), LOW),
    "low --start noise": (HIGH, replace(LOW, flags=("--start", "noise"))),
    "levels": _both(*LEVELS),
    "w*": _both(*CALIBRATED),
    "w* + levels": _both(*CALIBRATED, *LEVELS),
    "w* + levels + decay": _both(*CALIBRATED, *LEVELS, *DECAY),
    "w* + levels + decay, Euler": _both(*CALIBRATED, *LEVELS, *DECAY, *EULER),
    "regression": _both(*REGRESSION),
    "regression + decay": _both(*REGRESSION, *DECAY),
}
PLAIN = Experiment(
    model="toy", guidance=2, shift=12, students={"d": (FULL,)}, updates=(10, 20, 30),
    learning_rate="2e-4",
)  # fmt: skip
EXPERIMENTS = {
    "recipes": Experiment(
        model="toy-experts", guidance=4, shift=12, students=RECIPES,
        updates=(10, 20, 40, 80, 160), batch=16, uniform_sampling=True, captions=540, clips=540,
    ),
    "recipes-i2v": Experiment(
        model="toy-experts-i2v", guidance=4, shift=5, students=RECIPES,
        updates=(10, 20, 40, 80, 160), batch=16, uniform_sampling=True, captions=540, clips=540,
    ),
    "full": replace(
        PLAIN, loss_guidance=1.25, students={"d": (replace(FULL, flags=EULER),)}
    ),
    "renoise": replace(PLAIN, updates=(10, 20, 30, 40)),
    "i2v": replace(PLAIN, model="toy-i2v", shift=5, loss_guidance=1.25, updates=(10, 20)),
    "ema": replace(
        PLAIN, loss_guidance=1.25, learning_rate="5e-4",
        students={"d": (replace(FULL, flags=(*EULER, "--ema-decay", "0.8", "--ema-start", "5")),)},
    ),
    "fm": replace(
        PLAIN, loss_guidance=1.25, updates=(10, 20),
        students={
            "DMD alone": (replace(FULL, flags=EULER),),  # the very runs of `full`
            "+ 0.1 flow matching": (replace(FULL, flags=(*EULER, "--fm-loss-weight", "0.1")),),
            "+ 0.5 flow matching": (replace(FULL, flags=(*EULER, "--fm-loss-weight", "0.5")),),
        },
    ),
}  # fmt: skip


def quick(experiment: Experiment) -> Experiment:
    """The same code in about a minute; its numbers mean nothing."""
    return replace(experiment, updates=(1, 2), captions=64, clips=24, batch=8, teacher_steps=4)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One `wantrain distill` run, resumed where it was interrupted."""

    command: tuple[str, ...]
    folder: str
    updates: int

    @property
    def weights(self) -> Path:
        """Folder of the last checkpoint."""
        return Path(self.folder) / f"checkpoint-{self.updates}"

    @property
    def seconds(self) -> float:
        """That it took."""
        return float(json.loads((Path(self.folder) / "seconds.json").read_text()))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One set of latents to be made and measured: a teacher's, or a student's checkpoint."""

    model: str
    captions: int
    sampler: Sampler
    seed: int
    loras: tuple[tuple[str, str, float], ...] = ()
    """(expert, checkpoint's weight file, alpha / rank); none for the teacher."""
    trainings: tuple[Training, ...] = ()
    """The runs that leave them."""
    file: str
    """Where the latents go; a JSON file beside it has what was measured on them."""


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
    latents = bench.draw(bench.both(loras), draw.sampler, draw.seed)
    save_file({"latents": latents}, file)
    # Written last and renamed: where it is, both are whole.
    seen = bench.seen(latents) | deviations(latents, bench.captions)
    measured = json.dumps(seen)
    file.with_suffix(".tmp").write_text(measured)
    file.with_suffix(".tmp").rename(file.with_suffix(".json"))


def make_training(training: Training) -> None:
    """Run or resume it; done once. Its seconds are noted beside it."""
    folder = Path(training.folder)
    if training.weights.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (folder / "run.log").open("a") as log:
        subprocess.run(training.command, check=True, stdout=log, stderr=log)
    seconds = time.monotonic() - started
    (folder / "seconds.json").write_text(json.dumps(seconds))
    print(f"trained {folder.name} in {seconds:.0f} s", flush=True)


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


def shards_folder(model: str, clips: int, work: Path, *, new: bool = False) -> Path:
    """Where the training clips are; `new`: of what the toy was never shown."""
    return work / f"shards-{model}-{clips}{'-new' if new else ''}"


def make_shards(model: str, clips: int, work: Path, *, new: bool = False) -> Path:
    """Render and encode the training clips, once."""
    shards = shards_folder(model, clips, work, new=new)
    if not (shards / "index.zarr").exists():
        world = WORLDS[model]
        media = work / shards.name.replace("shards", "media", 1)
        captions = render_clips.NEW_CAPTIONS if new else world.captions
        render_clips.write_dataset(media, clips, 5000, 17, 64, 64, 16, captions, world.render)
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
        self.shards = shards_folder(experiment.model, experiment.clips, work)
        toy = ToyBench(experiment.model, 1)
        self.weights, self.boundary = toy.folder.name, toy.boundary  # the name carries a digest

    @property
    def teacher_shards(self) -> Path:
        """The teacher's own clips with their states at the student's timesteps."""
        one = self.experiment
        told: tuple[object, ...] = (
            self.weights, one.guidance, one.shift, one.teacher_steps, one.teacher_clips
        )  # fmt: skip
        if one.indices != FEW_STEPS:
            told += (one.indices,)
        return self.work / f"teacher-{one.model}-{short_digest(told)}"

    @property
    def guidance_file(self) -> Path:
        """w*(σ) of both experts."""
        return self.teacher_shards.with_suffix(".json")

    def preparations(self) -> list[tuple[Path, tuple[str, ...]]]:
        """(what it leaves, command) of what the arms ask for, in order."""
        one, wantrain = self.experiment, (sys.executable, str(SHORT_TEXT))
        asked = {flag for arms in one.students.values() for arm in arms for flag in arm.flags}
        found: list[tuple[Path, tuple[str, ...]]] = []
        if asked & {"{teacher}", "{guidance}"}:
            synthesize = (
                *wantrain, "synthesize", "--model", one.model, "--shards", str(self.shards),
                "--output", str(self.teacher_shards),
                "--count", str(min(one.clips, one.teacher_clips)),
                "--clips-per-caption", str(math.ceil(one.teacher_clips / one.clips)),
                "--steps", str(one.teacher_steps), "--guidance", str(one.guidance),
                "--flow-shift", str(MANY_SHIFT), "--states", " ".join(map(str, one.indices)),
                "--student-shift", str(one.shift), "--mixed-precision", "no",
                "--train-batch-size", "24",
            )  # fmt: skip
            found.append((self.teacher_shards / "index.zarr", synthesize))
        if "{guidance}" in asked:
            calibrate = (
                *wantrain, "calibrate", "--model", one.model, "--shards", str(self.teacher_shards),
                "--output", str(self.guidance_file), "--flow-shift", str(one.shift),
                "--clips", "48", "--mixed-precision", "no",
            )  # fmt: skip
            for expert in ("high", "low"):
                mark = self.guidance_file.with_suffix(f".{expert}")
                found.append((mark, (*calibrate, "--boundary-type", expert)))
        return found

    def prepare(self) -> None:
        """Make the training clips and what the arms ask for, once."""
        make_shards(self.experiment.model, self.experiment.clips, self.work)
        for left, command in self.preparations():
            if not left.exists():
                subprocess.run(command, check=True)
                left.touch()

    def training(self, arm: Arm, seed: int, updates: int | None = None) -> Training:
        """The run of an arm that gives its weights after `updates` (all: the last)."""
        one = self.experiment
        length = updates if updates and arm.decays else max(one.updates)
        places = {
            "{shards}": str(self.shards),
            "{teacher}": str(self.teacher_shards),
            "{guidance}": str(self.guidance_file),
        }
        flags: tuple[str, ...] = ("--model", one.model, "--boundary-type", arm.expert)
        if "--shards" not in arm.flags:
            flags += ("--shards", "{shards}")
        if "regression" not in arm.flags:
            flags += CRITIC
            if "--guidance" not in arm.flags:
                flags += ("--real-guidance-scale", str(one.loss_guidance or one.guidance))
        if one.indices != FEW_STEPS:
            flags += ("--denoising-step-indices-list", " ".join(map(str, one.indices)))
        if not one.uniform_sampling:
            flags += ("--no-uniform-sampling",)
        flags += (
            "--seed", str(seed), "--flow-shift", str(one.shift), *RECIPE.split(),
            "--learning-rate", one.learning_rate, "--train-batch-size", str(one.batch),
            *arm.flags,
        )  # fmt: skip
        # Names without the folder that this machine keeps them in.
        told = [Path(places[flag]).name if flag in places else flag for flag in flags]
        digest = short_digest((self.weights, told, length if arm.decays else 0))
        folder = self.work / "runs" / f"{arm.expert}-{digest}"
        every = length if arm.decays else math.gcd(*one.updates)
        command = (
            sys.executable, str(SHORT_TEXT), "distill", *(places.get(flag, flag) for flag in flags),
            "--output-dir", str(folder),
            "--max-train-steps", str(length), "--checkpointing-steps", str(every),
            "--resume-from-checkpoint", "latest",
        )  # fmt: skip
        return Training(command=command, folder=str(folder), updates=length)

    def _draw(
        self,
        sampler: Sampler,
        seed: int,
        loras: tuple[tuple[str, str, float], ...] = (),
        trainings: tuple[Training, ...] = (),
    ) -> Draw:
        one = self.experiment
        runs = self.work / "runs"
        named = [(e, Path(file).relative_to(runs).as_posix(), scale) for e, file, scale in loras]
        told = (self.weights, one.captions, sampler, seed, named)
        file = self.work / "latents" / f"{short_digest(told)}.safetensors"
        return Draw(
            model=one.model, captions=one.captions, sampler=sampler, seed=seed, loras=loras,
            trainings=trainings, file=str(file),
        )  # fmt: skip

    def many_steps(self, seed: int) -> Draw:
        one = self.experiment
        steps = even_steps(one.teacher_steps)
        return self._draw(Sampler(indices=steps, shift=MANY_SHIFT, guidance=one.guidance), seed)

    def few_steps(self, seed: int, *, guidance: float, renoise: bool) -> Draw:
        one = self.experiment
        sampler = Sampler(indices=one.indices, shift=one.shift, guidance=guidance, renoise=renoise)
        return self._draw(sampler, seed)

    def student(
        self, seed: int, *, arms: tuple[Arm, ...], updates: int, weights: str = "generator_weights"
    ) -> Draw:
        renoise = not any(arm.euler for arm in arms)
        one = self.experiment
        sampler = Sampler(indices=one.indices, shift=one.shift, renoise=renoise)
        trainings = tuple(self.training(arm, seed, updates) for arm in arms)
        loras = tuple(
            (
                arm.expert,
                f"{training.folder}/checkpoint-{updates}/{weights}.safetensors",
                ALPHA / RANK,
            )
            for arm, training in zip(arms, trainings, strict=True)
        )
        return self._draw(sampler, seed, loras, trainings)

    def arms(self, name: str) -> tuple[Arm, ...]:
        """A student's, without experts that none of its steps is for."""
        one = self.experiment
        schedule = Schedule(indices=one.indices, shift=one.shift, boundary=self.boundary)
        owning = {"full", *steps_by_expert(schedule.sigmas, self.boundary)}
        return tuple(arm for arm in one.students[name] if arm.expert in owning)

    def rows(self) -> dict[str, Callable[[int], Draw]]:
        """Label → the draw of a seed."""
        one = self.experiment
        euler = {name: arms[0].euler for name, arms in one.students.items()}
        steps = "1 step" if len(one.indices) == 1 else f"{len(one.indices)} steps"
        if one.indices != FEW_STEPS and len(one.indices) == len(FEW_STEPS):
            steps += f" at {' '.join(f'{index:g}' for index in one.indices)}"
        suffixes = {False: "", True: " (Euler)"}
        rows: dict[str, Callable[[int], Draw]] = {
            f"a  teacher, {one.teacher_steps} steps, CFG {one.guidance:g}": self.many_steps
        }
        for stepping in sorted(set(euler.values())):
            for letter, what, guidance in (
                ("b", f"CFG {one.guidance:g}", one.guidance),
                ("c", "no CFG", 1.0),
            ):
                rows[f"{letter}  teacher, {steps}, {what}{suffixes[stepping]}"] = partial(
                    self.few_steps, guidance=guidance, renoise=not stepping
                )
        for name in one.students:
            arms = self.arms(name)
            for updates in one.updates:
                of = "" if one.indices == FEW_STEPS else f"{steps}, "
                label = f"d  student, {of}{updates} updates{suffixes[euler[name]]}"
                if name != "d":
                    label += f": {name}"
                rows[label] = partial(self.student, arms=arms, updates=updates)
                if any(arm.averaged for arm in arms):
                    rows[f"{label}: average"] = partial(
                        self.student, arms=arms, updates=updates, weights="generator_ema"
                    )
        return rows


def run_all(jobs: Iterable[Training | Draw], processes: int) -> Iterator[Training | Draw]:
    """Do the jobs, `processes` at a time, and yield each that is done; the first failure ends it.

    In the order given, but a draw waits for its runs while others go on.
    """
    waiting = list(jobs)
    running: dict[Future[None], Training | Draw] = {}
    # spawn: a forked child of a process that has used torch may hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            undone = {job for job in (*waiting, *running.values()) if isinstance(job, Training)}
            ready = [
                j for j in waiting if isinstance(j, Training) or undone.isdisjoint(j.trainings)
            ]
            for job in ready[: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(make, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                yield running.pop(future)


METRICS = ("accuracy", "distance", "contrast", "variety", "between", "motion")
# Of the reference's own number, which is what its ratio is taken of.
RATIOS = {"contrast": "contrast", "variety": "within", "between": "between", "motion": "travel"}


@dataclass(frozen=True)
class Results:
    """What was measured, a JSON object a line: on this machine now, or in an earlier session."""

    file: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """Key → result."""
        if not self.file.exists():
            return {}
        found = map(json.loads, self.file.read_text().splitlines())
        return {one["key"]: one for one in found}

    def append(self, result: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")


def result_key(bench: Bench, draw: Draw) -> str:
    """What decides the numbers of a draw: how it was made, and what it is compared with."""
    return f"{Path(draw.file).stem}-{Path(bench.many_steps(REFERENCE_SEED).file).stem}"


def measure(bench: Bench, draw: Draw) -> dict[str, Any]:
    """The metrics of a draw that was made, and the seconds of the runs behind it."""
    reference = bench.many_steps(REFERENCE_SEED)
    seen, of_reference = _measured(draw), _measured(reference)
    one, other = (load_file(file)["latents"] for file in (draw.file, reference.file))
    found: dict[str, Any] = {
        "accuracy": seen["accuracy"],
        "distance": sliced_wasserstein(one, other),
    }
    found |= {metric: seen[key] / of_reference[key] for metric, key in RATIOS.items()}
    runs = {Path(run.folder).name: run.seconds for run in draw.trainings}
    return {metric: round(value, 5) for metric, value in found.items()} | {"runs": runs}


def make_all(bench: Bench, results: Results, processes: int) -> dict[tuple[str, int], Any]:
    """(row, seed) → result. Makes what has no result yet, a seed at a time."""
    known = results.read()
    wanted = {
        (row, seed): draw_of(seed) for seed in bench.seeds for row, draw_of in bench.rows().items()
    }
    keys = {which: result_key(bench, draw) for which, draw in wanted.items()}
    missing = {which: draw for which, draw in wanted.items() if keys[which] not in known}
    if not missing:
        return {which: known[key] for which, key in keys.items()}
    bench.prepare()
    names: dict[str, list[tuple[str, int]]] = {}
    for which, draw in missing.items():
        names.setdefault(draw.file, []).append(which)
    reference = bench.many_steps(REFERENCE_SEED)
    for _ in run_all([reference], processes):
        pass
    jobs = dict.fromkeys(job for draw in missing.values() for job in (*draw.trainings, draw))
    for job in run_all(jobs, processes):
        for row, seed in names.get(job.file, []) if isinstance(job, Draw) else []:
            key = keys[row, seed]
            known[key] = {"key": key, "model": bench.weights, "row": row, "seed": seed}
            known[key] |= {"teacher_clips": bench.experiment.teacher_clips}
            known[key] |= measure(bench, job)
            results.append(known[key])
    return {which: known[key] for which, key in keys.items()}


def table_of(found: Mapping[tuple[str, int], Any]) -> dict[str, dict[str, list[float]]]:
    """Row → metric → the value of each seed."""
    table: dict[str, dict[str, list[float]]] = {}
    for (row, _), result in found.items():
        for metric in METRICS:
            table.setdefault(row, {}).setdefault(metric, []).append(result[metric])
    return table


def _measured(draw: Draw) -> dict[str, float]:
    found: dict[str, float] = json.loads(Path(draw.file).with_suffix(".json").read_text())
    return found


def markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """The table for people: mean ± standard error over the seeds."""
    lines = [f"| | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for label, row in table.items():
        cells = []
        for metric in METRICS:
            mean, error = mean_and_error(row[metric])
            digits = 3 if metric in ("accuracy", "distance") else 2
            spread = f" ± {error:.{digits}f}" if math.isfinite(error) else ""
            cells.append(f"{mean:.{digits}f}{spread}" if math.isfinite(mean) else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def passes(experiment: Experiment, arm: Arm, boundary: float, updates: int) -> float:
    """Transformer passes of single clips that a run takes, a backward pass counted as two.

    A rollout ends at each of the expert's steps equally often, and only its last pass has a
    gradient. Five critic updates to one of the generator, whose teacher is guided.
    """
    if "regression" in arm.flags:
        return updates * _batch(experiment, arm) * 3
    schedule = Schedule(indices=experiment.indices, shift=experiment.shift, boundary=boundary)
    steps = (
        len(experiment.indices) if "seed" in arm.flags else len(schedule.owned_steps(arm.expert))
    )
    rollout = (steps + 1) / 2
    critic, generator = rollout + 3, rollout + 2 + 1 + 2
    return updates * _batch(experiment, arm) * (5 * critic + generator)


def _batch(experiment: Experiment, arm: Arm) -> int:
    """Samples of an optimizer step; of a flag given twice the last counts."""
    told = dict(zip(arm.flags, arm.flags[1:], strict=False))
    batch = int(told.get("--train-batch-size", experiment.batch))
    return batch * int(told.get("--gradient-accumulation-steps", 1))


def cost(bench: Bench, found: Mapping[tuple[str, int], Any]) -> str:
    """Of all runs of the table: passes, and minutes as they were noted when they were made."""
    one = bench.experiment
    runs = {
        bench.training(arm, seed, updates): (arm, updates if arm.decays else max(one.updates))
        for name in one.students
        for arm in bench.arms(name)
        for updates in one.updates
        for seed in bench.seeds
    }
    taken = sum(passes(one, arm, bench.boundary, length) for arm, length in runs.values())
    noted = {name: seconds for result in found.values() for name, seconds in result["runs"].items()}
    made = one.teacher_clips * (2 * one.teacher_steps + 6) if bench.preparations() else 0
    return (
        f"{len(runs)} runs: {taken / 1000:.0f} thousand clip-passes, "
        f"{sum(noted.values()) / 60:.0f} minutes of one core; the teacher's clips: "
        f"{made / 1000:.0f} thousand"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--students", nargs="+", help="only these rows of the experiment")
    parser.add_argument("--updates", type=int, nargs="+", help="generator updates to measure after")
    parser.add_argument("--guidance", type=float, help="the teacher's CFG scale")
    parser.add_argument("--shift", type=float, help="of the few steps")
    parser.add_argument(
        "--indices", type=float, nargs="+", help="of the few steps: 1000 250 are two"
    )
    parser.add_argument("--flags", default="", help="more of wantrain's, for every arm")
    parser.add_argument("--captions", type=int, help="clips of each row and seed")
    parser.add_argument("--teacher-clips", type=int, help="of the teacher's own, to learn from")
    parser.add_argument("--quick", action="store_true", help="tiny; the numbers mean nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--results", type=Path, help="what was measured; is added to")
    parser.add_argument("--table", type=Path, help="JSON of this table, for plot_learning.py")
    args = parser.parse_args()
    started = time.monotonic()

    experiment = EXPERIMENTS[args.experiment]
    if args.quick:
        experiment, args.seeds = quick(experiment), min(args.seeds, 2)
    args.results = (
        args.results or (args.work if args.quick else Path(__file__).parent) / "results.jsonl"
    )
    if args.students:
        students = {name: experiment.students[name] for name in args.students}
        experiment = replace(experiment, students=students)
    if args.indices:
        experiment = replace(experiment, indices=tuple(args.indices))
    if args.updates:
        experiment = replace(experiment, updates=tuple(sorted(args.updates)))
    for name in ("guidance", "shift", "captions", "teacher_clips"):
        if getattr(args, name) is not None:
            experiment = replace(experiment, **{name: getattr(args, name)})
    if args.flags:
        students = {
            f"{name}, {args.flags}": tuple(
                replace(arm, flags=(*arm.flags, *args.flags.split())) for arm in arms
            )
            for name, arms in experiment.students.items()
        }
        experiment = replace(experiment, students=students)

    (args.work / "latents").mkdir(parents=True, exist_ok=True)
    bench = Bench(experiment, args.seeds, args.work.resolve())
    found = make_all(bench, Results(args.results), args.processes)

    table = table_of(found)
    result = {"seeds": args.seeds, "captions": experiment.captions, "rows": table}
    (args.table or args.work / f"{args.experiment}.json").write_text(json.dumps(result, indent=2))
    print(markdown(table))
    print(f"\n{cost(bench, found)}")
    print(f"{time.monotonic() - started:.0f} s on {args.processes} processes of one thread")


if __name__ == "__main__":
    main()
