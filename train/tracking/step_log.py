"""What people see of a run while it runs: the progress line, and numbers in trackers.

`docs/watch.md` says what they mean and what good looks like.
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from train.methods.step_output import StepNumbers
from train.tracking.progress import TrainProgress
from train.tracking.trackers import Tracker

SECONDS, SAMPLES = "speed/seconds_per_update", "speed/samples_per_second"
DATA_WAIT = "speed/data_wait_seconds"
PEAK = "memory/peak_gib"
HISTOGRAM_EVERY = 100
"""Levels of so many samples of a role make a histogram."""


class StepLog:
    """Takes the time, and tells progress line and trackers of every update."""

    def __init__(
        self, progress: TrainProgress, trackers: Sequence[Tracker], *, device: torch.device
    ) -> None:
        self._progress, self._trackers, self._device = progress, trackers, device
        self._began = time.perf_counter()
        self._waited = 0.0
        self._levels: dict[str, list[float]] = {}

    def held_out(self, loss: float) -> None:
        """A loss on what is held out was measured."""
        self._progress.held_out(loss)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block runs, the loop waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes is no part of any update."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def update(
        self,
        role: str,
        numbers: StepNumbers,
        *,
        grad_norm: float,
        learning_rate: float,
        samples: int,
        done: int,
        gauges: Mapping[str, float],
    ) -> None:
        """An optimizer step is done; with it, `done` steps of all roles are."""
        now = time.perf_counter()
        seconds, waited = now - self._began, self._waited
        self._began, self._waited = now, 0.0
        peak = peak_memory(self._device)
        figures = {
            name.removeprefix("gauge/"): value for name, value in gauges.items() if "@" not in name
        }
        self._progress.step(
            role, numbers.loss, done, figures, seconds=seconds, samples=samples, peak=peak
        )
        values = {
            f"loss/{role}": numbers.loss,
            f"grad_norm/{role}": grad_norm,
            f"learning_rate/{role}": learning_rate,
            f"score_sigma/{role}": sum(numbers.sigma) / len(numbers.sigma),
            **numbers.named(),
            **gauges,
            SECONDS: seconds,
            SAMPLES: samples / seconds,
            DATA_WAIT: waited,
            PEAK: peak / 2**30,
        }
        levels = self._levels.setdefault(role, [])
        levels += numbers.u
        for tracker in self._trackers:
            tracker.log(values, done)
            if len(levels) >= HISTOGRAM_EVERY:
                tracker.histogram(f"score_level/{role}", levels, done)
        if len(levels) >= HISTOGRAM_EVERY:
            levels.clear()


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
