"""The overhead of a run: its loop, measured from outside, and its loader against a plain read.

The loop has no code for this. torch's hooks report every pass of the transformer, forward and
backward, and every optimizer step; the time between them is the overhead.
"""

import csv
import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

from train.bench import flops
from train.data.batches import load_prompt_bank
from train.loop import micro_batches, train
from train.memory.block_offload import streamed_blocks
from train.run import Run
from train.strategies.spread import held_bytes
from train.tracking.step_log import DATA_WAIT, peak_memory
from train.tracking.trackers import CSV, CSV_FILE

LEAN_GOAL, RESIDENT_GOAL, LOADER_GOAL = 1.02, 1.05, 0.9
RAW_CHUNK = 1 << 20
"""Bytes of a plain read: into one buffer that stays in the CPU's cache, the fastest there is."""
MOST_LOADED = 1 << 30
"""Bytes that one measurement of the loader reads."""
MOST_UPDATES = 1000
"""Of one measurement, where samples are small."""
ROUNDS = 7

Kind = Literal[
    "start", "look", "looked", "forward", "forward end", "backward", "backward end", "step"
]
# What lies between two neighbouring marks.
_BETWEEN = {
    ("forward", "forward end"): "forward passes",
    ("backward", "backward end"): "backward passes",
    ("start", "forward"): "before an update's first pass: data, noise",
    ("step", "look"): "before an update's first pass: data, noise",
    ("looked", "forward"): "before an update's first pass: data, noise",
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
class Resident:
    """Bytes of all tensors that this process holds between two updates."""

    base: int
    """Weights without LoRAs; this rank's part, where a strategy shards them."""
    streamed: int
    """Those of them that live in CPU memory, by --low-vram or --blocks-to-swap."""
    stream_buffers: int
    """Of the device, which those visit."""
    loras: int
    optimizers: int
    others: int
    """Batches that were read ahead, embeddings, and whatever else a process holds."""
    peak: int
    """Most bytes of the GPU's memory, or of this process."""
    reserved: int | None
    """Most bytes that torch had taken of the GPU, what it kept for reuse included; None: no GPU."""

    @property
    def needed(self) -> int:
        """One base, the buffers by which it is streamed, its LoRAs and their optimizer states."""
        return self.base + self.stream_buffers + self.loras + self.optimizers

    @property
    def over_needed(self) -> float:
        """All tensors over those."""
        return (self.needed + self.others) / self.needed


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
class Loader:
    """Bytes a second of one thread, medians."""

    raw: float
    """A sequential read of the same shards, page cache warm."""
    loaded: float
    ratio: float
    """Median over rounds, so that whatever else the machine does strikes both."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `wantrain bench` found."""

    device: str
    processes: int
    """Of the run; what follows is the first one's."""
    load: float
    """What else the machine did: its load average before."""
    loop: Loop | None
    work: Work | None
    resident: Resident | None
    """None where only the loader was measured."""
    loader: Loader

    def lines(self) -> list[str]:
        """For people."""
        loader = self.loader
        processes = f", process 0 of {self.processes}" if self.processes > 1 else ""
        return [
            f"device   {self.device}, load {self.load:.1f}{processes}",
            *self._loop_lines(),
            f"loader   {loader.loaded / 2**30:.2f} GiB/s a thread, plain read "
            f"{loader.raw / 2**30:.2f} GiB/s",
            f"loader / sequential read: {loader.ratio:.3f} "
            f"({verdict(loader.ratio >= LOADER_GOAL, f'≥ {LOADER_GOAL}')})",
        ]

    def _loop_lines(self) -> list[str]:
        loop, resident, work = self.loop, self.resident, self.work
        if loop is None or resident is None or work is None:
            return []
        share = {name: seconds / loop.seconds for name, seconds in loop.parts.items()}
        gib = 2**30
        reserved = f", {resident.reserved / gib:.3f} reserved" if resident.reserved else ""
        cpu = its_buffers = ""
        if resident.streamed:
            its_buffers = ", its buffers"
            cpu = f" ({resident.streamed / gib:.3f} in CPU memory){its_buffers} "
            cpu += f"{resident.stream_buffers / gib:.3f}"
        return [
            *(f"update   {role}: {seconds:.3f} s" for role, seconds in loop.by_role.items()),
            *(f"time     {name}: {part:.2%}" for name, part in share.items()),
            f"time     … of it waiting for data: {loop.data_wait / loop.seconds:.2%}",
            f"memory   base {resident.base / gib:.3f} GiB{cpu}, LoRAs {resident.loras / gib:.3f}, "
            f"optimizers {resident.optimizers / gib:.3f}, other tensors "
            f"{resident.others / gib:.3f}; peak {resident.peak / gib:.3f}{reserved}",
            *work.lines(),
            f"start    {loop.to_first_step:.1f} s from process to the end of the first step",
            f"step time / only passes: {loop.over_passes:.4f} "
            f"({verdict(loop.over_passes <= LEAN_GOAL, f'≤ {LEAN_GOAL}')})",
            f"resident / one base{its_buffers}, LoRAs, optimizers: {resident.over_needed:.4f} "
            f"({verdict(resident.over_needed <= RESIDENT_GOAL, f'≤ {RESIDENT_GOAL}')})",
        ]

    def to_text(self) -> str:
        """As JSON."""
        ratios = {
            "over_passes": self.loop and self.loop.over_passes,
            "over_needed": self.resident and self.resident.over_needed,
            "loader": self.loader.ratio,
            "utilisation": self.work and self.work.utilisation,
        }
        return json.dumps({**asdict(self), "ratios": ratios}, indent=2)


def verdict(reached: bool, goal: str) -> str:
    """A goal and whether it was reached, in words."""
    return f"goal {goal}: {'reached' if reached else 'missed'}"


def measure(run: Run, console: Console, *, cycles: int) -> Report | None:
    """Train `cycles` cycles after one to warm up, in a folder that is thrown away, then read.
    0: only read. All processes of the run call it; the first one reports, the others give None.

    Raises UserError as training does.
    """
    load = os.getloadavg()[0]
    watcher = _train_watched(run, console, cycles) if cycles else None
    if not run.ranks.first:
        return None
    loop = None if watcher is None else watcher.loop()
    return Report(
        device=_device_name(torch.device(run.device)),
        processes=run.ranks.world_size,
        load=load,
        loop=loop,
        work=None if watcher is None or loop is None else _work(watcher.run, loop),
        resident=None if watcher is None else watcher.resident(),
        loader=measure_loader(run),
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


def _train_watched(run: Run, console: Console, cycles: int) -> "_Watcher":
    with tempfile.TemporaryDirectory(prefix="wantrain-bench-") as folder:
        config = replace(
            run.config,
            output_dir=Path(folder),
            resume_from_checkpoint=None,
            validation_steps=None,
            report_to=CSV,
            logging_dir=None,
            checkpoints_total_limit=None,
            checkpointing_steps=cycles + 2,
        )
        run = replace(run, config=config, steps=cycles + 1)
        watcher = _Watcher(run)
        with watcher.watching():
            train(run, console)
        if run.ranks.first:
            with (config.output_dir / "logs" / CSV_FILE).open(newline="") as stream:
                watcher.waits = [float(row[DATA_WAIT]) for row in csv.DictReader(stream)]
    return watcher


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s)"


@dataclass
class _Watcher:
    """Marks of a run, in the device's own time, and the tensors that lay there between updates."""

    run: Run
    marks: list[tuple[Kind, Any]] = field(default_factory=list)
    first_step_at: float | None = None
    optimizers: dict[int, int] = field(default_factory=dict)
    """id → bytes of state."""
    waits: list[float] = field(default_factory=list)
    """Seconds of each update in which the loop waited for data, as the run reported them."""
    sizes: Mapping[str, int] | None = None
    """Of `Resident`, optimizers among the others; taken once, before the last update."""

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
        if torch.device(self.run.device).type != "cuda":
            self.marks.append((kind, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((kind, event))

    def _seconds(self, one: Any, other: Any) -> float:
        if isinstance(one, float):
            return float(other - one)
        return float(one.elapsed_time(other)) / 1000

    def _before_module(self, module: nn.Module, inputs: Any) -> None:
        if self.run.spec.family.is_of(module):
            if self.sizes is None and self._steps == self.run.updates - 1:
                self._mark("look")  # which takes time that a run does not
                self.sizes = _sizes(module)
                self._mark("looked")
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
        self.optimizers[id(optimizer)] = held_bytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    @property
    def _steps(self) -> int:
        return sum(kind == "step" for kind, _ in self.marks)

    def loop(self) -> Loop:
        """The time after the first cycle."""
        if self.marks and not isinstance(self.marks[-1][1], float):
            torch.cuda.synchronize()
        steps = [place for place, (kind, _) in enumerate(self.marks) if kind == "step"]
        assert len(steps) == self.run.updates and self.first_step_at is not None
        warm = self.marks[steps[self.run.cycle - 1] : steps[-1] + 1]
        parts: dict[str, float] = dict.fromkeys(dict.fromkeys(_BETWEEN.values()), 0.0)
        looking = 0.0
        for (kind, at), (following, then) in pairwise(warm):
            if kind == "look":
                looking = self._seconds(at, then)
            else:
                parts[_BETWEEN[kind, following]] += self._seconds(at, then)
        by_role: dict[str, list[float]] = defaultdict(list)
        for update in range(self.run.cycle, self.run.updates):
            at, then = self.marks[steps[update - 1]][1], self.marks[steps[update]][1]
            seconds = self._seconds(at, then) - (looking if update == self.run.updates - 1 else 0)
            by_role[self.run.objective.role_of(update)].append(seconds)
        return Loop(
            updates=self.run.updates - self.run.cycle,
            seconds=self._seconds(warm[0][1], warm[-1][1]) - looking,
            parts=parts,
            by_role={role: statistics.median(seconds) for role, seconds in by_role.items()},
            data_wait=sum(self.waits[self.run.cycle :]),
            to_first_step=self.first_step_at - psutil.Process().create_time(),
        )

    def resident(self) -> Resident:
        """The tensors before the last update."""
        assert self.sizes is not None
        optimizers = sum(self.optimizers.values())
        device = torch.device(self.run.device)
        on_gpu = device.type == "cuda"
        return Resident(
            **{**self.sizes, "others": self.sizes["others"] - optimizers},
            optimizers=optimizers,
            peak=peak_memory(device),
            reserved=torch.cuda.max_memory_reserved(device) if on_gpu else None,
        )


def _sizes(transformer: nn.Module) -> dict[str, int]:
    """Bytes of the transformer's parts in `Resident`, and as others those of all tensors else that
    the process holds."""
    blocks = streamed_blocks(transformer)
    streamed, buffers = (0, 0) if blocks is None else (blocks.home_bytes, blocks.buffer_bytes)
    parameters = [p for p in transformer.parameters() if blocks is None or p not in blocks]
    base = streamed + held_bytes(p for p in parameters if not p.requires_grad)
    loras = held_bytes(p for p in parameters if p.requires_grad)
    places = dict(place for place in map(_place, gc.get_objects()) if place is not None)
    return {
        "base": base,
        "streamed": streamed,
        "stream_buffers": buffers,
        "loras": loras,
        "others": sum(places.values()) - base - buffers - loras,
    }


def _place(thing: Any) -> tuple[int, int] | None:
    """Address and bytes of a tensor's storage; None of what has none in memory: tensors on meta,
    and those that torch.compile keeps to stand for real ones."""
    if not issubclass(type(thing), torch.Tensor):
        return None
    try:
        storage = thing.untyped_storage()
        return None if storage.device.type == "meta" else (storage.data_ptr(), storage.nbytes())
    except RuntimeError:  # torch has no other way to say that functional tensors have no memory
        return None


def measure_loader(run: Run) -> Loader:
    """One thread that makes the run's batches, beside a sequential read of the same shards."""
    run = replace(run, config=replace(run.config, caption_dropout=0.0))
    dataset = micro_batches(run, load_prompt_bank(run.data.first, run.spec.family))

    def load(updates: int) -> int:
        done = 0
        for batch in dataset.ahead(start=0, stop=updates, workers=0):
            tensors = (batch.latents, batch.condition, batch.image, *batch.texts)
            done += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return done

    fitting = MOST_LOADED // max(1, load(1))
    updates = max(1, min(run.plan.batches_per_epoch, MOST_UPDATES, fitting))
    indices = [part.index for part in run.data.parts]
    shards = [(index.store, name) for index in indices for name in index.shards]
    buffer = bytearray(RAW_CHUNK)

    def read() -> int:
        done = 0
        for store, name in shards:
            with store.shard_file(store.folder / name).open("rb", buffering=0) as stream:
                while done < MOST_LOADED and (got := stream.readinto(buffer)):
                    done += got
        return done

    load(updates)
    read()
    rates: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        bytes_read = read()
        between = time.perf_counter()
        bytes_loaded = load(updates)
        raw = bytes_read / (between - began)
        rates.append((raw, bytes_loaded / (time.perf_counter() - between)))
    return Loader(
        raw=statistics.median(raw for raw, _ in rates),
        loaded=statistics.median(loaded for _, loaded in rates),
        ratio=statistics.median(loaded / raw for raw, loaded in rates),
    )
