"""The overhead of a run: its loop, measured from outside.

The loop has no code for this. torch's hooks report every pass of the transformer, forward and
backward, and every optimizer step; the time between them is the overhead.
"""

import csv
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from train.bench import flops
from train.config import DistillConfig
from train.data.batches import load_prompt_bank
from train.loop import micro_batches, train
from train.run import Run, estimate
from train.tracking.step_log import DATA_WAIT, peak_memory
from train.tracking.trackers import CSV, CSV_FILE

Kind = Literal["start", "forward", "forward end", "backward", "backward end", "step"]
# What lies between two neighbouring marks.
_BETWEEN = {
    ("forward", "forward end"): "forward passes",
    ("backward", "backward end"): "backward passes",
    ("start", "forward"): "before an update's first pass: data, noise",
    ("step", "forward"): "before an update's first pass: data, noise",
    ("backward end", "forward"): "before an update's first pass: data, noise",
    ("forward end", "forward"): "between passes: x0, noise, guidance",
    ("forward end", "backward"): "between forward and backward: losses",
    ("backward end", "step"): "after the last pass: clipping, optimizer",
}
PASSES = ("forward passes", "backward passes")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Whole cycles of updates, after one that warmed up."""

    updates: int
    seconds: float
    parts: Mapping[str, float]
    """Where they went; `PASSES` are the transformer's."""
    by_role: Mapping[str, float]
    """Role → seconds of one update, the median."""
    data_wait: float
    """Of the seconds, those in which the loop waited for a batch; a part of the first of `parts`
    that is no pass."""
    to_first_step: float
    """Seconds from the start of the process to the end of the first optimizer step."""

    @property
    def over_passes(self) -> float:
        """Step time over the time of only the transformer passes."""
        return self.seconds / sum(self.parts[name] for name in PASSES)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Model FLOPs of the measured updates (`train.bench.flops`), and how fast they were done."""

    by_role: Mapping[str, float]
    """Role → FLOPs of one update, the mean: how many passes it has is drawn."""
    in_passes: float
    """FLOP/s inside the transformer's passes."""
    overall: float
    """FLOP/s of the whole loop."""
    peak: float | None
    """FLOP/s of the card in dense bf16; None where it is not known."""

    @property
    def utilisation(self) -> float | None:
        """MFU: of the whole loop."""
        return None if self.peak is None else self.overall / self.peak

    def lines(self) -> list[str]:
        """For people."""
        tera, peak = 1e12, self.peak
        of_peak = f", of {peak / tera:.1f} (MFU {self.utilisation:.1%})" if peak else ""
        return [
            *(f"work     {role}: {each / tera:.4g} TFLOP" for role, each in self.by_role.items()),
            f"work     {self.in_passes / tera:.4g} TFLOP/s inside the passes, "
            f"{self.overall / tera:.4g} of the whole loop{of_peak}",
        ]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `wantrain bench` found."""

    device: str
    processes: int
    """Of the run; what follows is the first one's."""
    load: float
    """What else the machine did: its load average before."""
    loop: Loop
    work: Work
    peak: int
    """Most bytes of the GPU's memory, or of this process."""
    reserved: int | None
    """Most bytes that torch had taken of the GPU, what it kept for reuse included; None: no GPU."""
    planned: int | None
    """Bytes of the device that --dry-run states; None where it states none."""

    def lines(self) -> list[str]:
        """For people."""
        loop, gib = self.loop, 2**30
        processes = f", process 0 of {self.processes}" if self.processes > 1 else ""
        reserved = f", {self.reserved / gib:.3f} reserved" if self.reserved else ""
        planned = f"; planned {self.planned / gib:.3f}" if self.planned else ""
        return [
            f"device   {self.device}, load {self.load:.1f}{processes}",
            *(f"update   {role}: {seconds:.3f} s" for role, seconds in loop.by_role.items()),
            *(f"time     {name}: {part / loop.seconds:.2%}" for name, part in loop.parts.items()),
            f"time     … of it waiting for data: {loop.data_wait / loop.seconds:.2%}",
            f"memory   peak {self.peak / gib:.3f} GiB{reserved}{planned}",
            *self.work.lines(),
            f"start    {loop.to_first_step:.1f} s from process to the end of the first step",
            f"step time / only passes: {loop.over_passes:.4f}",
        ]

    def to_text(self) -> str:
        """As JSON."""
        ratios = {"over_passes": self.loop.over_passes, "utilisation": self.work.utilisation}
        return json.dumps({**asdict(self), "ratios": ratios}, indent=2)


def measure(run: Run, console: Console, *, cycles: int) -> Report | None:
    """Train `cycles` cycles after one to warm up, in a folder that is thrown away.

    All processes of the run call it; the first one reports, the others give None. Raises UserError
    as training does.
    """
    load = os.getloadavg()[0]
    with briefly(run, cycles) as run:
        watcher = _Watcher(run)
        with watcher.watching():
            train(run, console, keep=False)  # gigabytes that nobody wants
        if not run.ranks.first:
            return None
        with (run.config.output_dir / "logs" / CSV_FILE).open(newline="") as stream:
            waits = [float(row[DATA_WAIT]) for row in csv.DictReader(stream)]
    loop, device = watcher.loop(waits), torch.device(run.device)
    planned = estimate(run)
    return Report(
        device=_device_name(device),
        processes=run.ranks.world_size,
        load=load,
        loop=loop,
        peak=peak_memory(device),
        reserved=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        planned=None if planned is None else planned.total,
        work=_work(run, loop),
    )


def _work(run: Run, loop: Loop) -> Work:
    bank = load_prompt_bank(run.data.first, run.spec.family)
    measured = range(run.cycle, run.updates)
    counted = flops.count(run, micro_batches(run, bank), bank, measured)
    by_role: dict[str, list[int]] = defaultdict(list)
    for update, of_update in counted.items():
        by_role[run.objective.role_of(update)].append(of_update)
    everything = sum(counted.values())
    return Work(
        by_role={role: statistics.mean(each) for role, each in by_role.items()},
        in_passes=everything / sum(loop.parts[name] for name in PASSES),
        overall=everything / loop.seconds,
        peak=flops.bf16_peak(_device_name(torch.device(run.device))),
    )


@contextmanager
def briefly(run: Run, cycles: int) -> Iterator[Run]:
    """The run with one cycle to warm up and `cycles` more, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="wantrain-bench-") as folder:
        assert isinstance(run.config, DistillConfig)
        config = replace(
            run.config,
            output_dir=Path(folder),
            resume_from_checkpoint=None,
            validation_steps=None,
            gauge_batches=0,
            keep_best=None,
            report_to=CSV,
            logging_dir=None,
            checkpoints_total_limit=None,
            checkpointing_steps=cycles + 2,
        )
        yield replace(run, config=config, steps=cycles + 1)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s)"


@dataclass
class _Watcher:
    """Marks of a run, in the device's own time."""

    run: Run
    marks: list[tuple[Kind, Any]] = field(default_factory=list)
    first_step_at: float | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block trains."""
        with ExitStack() as hooks:
            for handle in (
                register_module_forward_pre_hook(self._before_module),
                register_module_forward_hook(self._after_module),
                register_optimizer_step_post_hook(self._after_step),
            ):
                hooks.callback(handle.remove)
            self._mark("start")
            yield

    def _mark(self, kind: Kind) -> None:
        device = torch.device(self.run.device)
        if device.type != "cuda":
            self.marks.append((kind, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))  # autograd's threads have their own device
        self.marks.append((kind, event))

    def _seconds(self, one: Any, other: Any) -> float:
        if isinstance(one, float):
            return float(other - one)
        return float(one.elapsed_time(other)) / 1000

    def _before_module(self, module: nn.Module, inputs: Any) -> None:
        if self.run.spec.family.is_of(module):
            self._mark("forward")

    def _after_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.run.spec.family.is_of(module):
            return
        self._mark("forward end")
        velocity = output[0]
        if velocity.requires_grad:
            velocity.register_hook(self._before_backward)

    def _before_backward(self, gradient: torch.Tensor) -> None:
        if self.marks[-1][0] == "backward":
            return  # a loss of two passes: one backward pass goes through both
        self._mark("backward")
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._mark("backward end"))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.marks[-1][0] == "step":
            self.marks.pop()  # DeepSpeed makes an update's step in parts
        self._mark("step")
        if self.first_step_at is None:
            self.first_step_at = time.time()

    def loop(self, waits: Sequence[float]) -> Loop:
        """The time after the first cycle. `waits`: seconds of each update in which the run, as it
        reported, waited for data."""
        if self.marks and not isinstance(self.marks[-1][1], float):
            torch.cuda.synchronize(self.run.device)
        steps = [place for place, (kind, _) in enumerate(self.marks) if kind == "step"]
        assert len(steps) == self.run.updates and self.first_step_at is not None
        warm = self.marks[steps[self.run.cycle - 1] : steps[-1] + 1]
        parts: dict[str, float] = dict.fromkeys(dict.fromkeys(_BETWEEN.values()), 0.0)
        for (kind, at), (following, then) in pairwise(warm):
            parts[_BETWEEN[kind, following]] += self._seconds(at, then)
        by_role: dict[str, list[float]] = defaultdict(list)
        for update in range(self.run.cycle, self.run.updates):
            at, then = self.marks[steps[update - 1]][1], self.marks[steps[update]][1]
            by_role[self.run.objective.role_of(update)].append(self._seconds(at, then))
        return Loop(
            updates=self.run.updates - self.run.cycle,
            seconds=self._seconds(warm[0][1], warm[-1][1]),
            parts=parts,
            by_role={role: statistics.median(seconds) for role, seconds in by_role.items()},
            data_wait=sum(waits[self.run.cycle :]),
            to_first_step=self.first_step_at - psutil.Process().create_time(),
        )
