"""The progress line of a training run."""

from collections.abc import Iterable, Mapping

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_RECENT = 0.1
"""Weight of the last update in the speed that is shown."""


class TrainProgress(Progress):
    """Steps of the main role, losses, speed, peak memory, elapsed time and what is left of it."""

    def __init__(
        self,
        steps: int,
        cycle: int,
        console: Console,
        *,
        head_start: int = 0,
        title: str,
        start: int,
        device: torch.device,
    ) -> None:
        self._figures = self._gauges = ""  # looked at while the base is made
        super().__init__(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._cycle, self._head_start = cycle, head_start
        self._memory = "GPU" if device.type == "cuda" else "RAM"
        self._losses: dict[str, float] = {}
        self._seconds: float | None = None
        self._task = self.add_task(title, total=steps, completed=int(self._steps(start)))

    def get_renderables(self) -> Iterable[RenderableType]:
        """Bar and times, and the figures below, which would squeeze them out of a line."""
        yield self.make_tasks_table(self.tasks)
        for line in filter(None, (self._figures, self._gauges)):
            yield Text(line, overflow="ellipsis", no_wrap=True)

    def _steps(self, updates: int) -> float:
        """None before the first cycle begins."""
        return max(0, updates - self._head_start) / self._cycle

    def held_out(self, loss: float) -> None:
        """Show the last loss on what is held out."""
        self._losses["held out"] = loss

    def step(
        self,
        role: str,
        loss: float,
        updates: int,
        gauges: Mapping[str, float],
        *,
        seconds: float,
        samples: int,
        peak: int,
    ) -> None:
        """Show one finished optimizer step of `samples`; `peak` memory in bytes."""
        self._losses[role] = loss
        before = seconds if self._seconds is None else self._seconds
        self._seconds = (1 - _RECENT) * before + _RECENT * seconds
        figures = [f"{name} {value:.4f}" for name, value in sorted(self._losses.items())]
        self._gauges = "  ".join(f"{name} {value:.2f}" for name, value in gauges.items())
        figures.append(f"{self._seconds:.2f} s/update")
        figures.append(f"{samples / self._seconds:.3g} samples/s")
        figures.append(f"peak {peak / 2**30:.1f} GiB {self._memory}")
        self._figures = "  ".join(figures)
        self.update(self._task, completed=self._steps(updates))
