"""The progress line of a training run."""

import time

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainProgress(Progress):
    """Updates of the product done, losses, seconds an update, peak device memory, time left."""

    def __init__(
        self,
        product_updates: int,
        cycle: int,
        console: Console,
        *,
        title: str,
        start: int,
        device: torch.device,
    ) -> None:
        super().__init__(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._cycle = cycle
        self._device = device
        self._losses: dict[str, float] = {}
        self._started_at = time.monotonic()
        self._first = start
        self._task = self.add_task(
            title, total=product_updates, completed=start // cycle, figures=""
        )

    def step(self, role: str, loss: float, updates: int) -> None:
        """Show one finished optimizer step."""
        self._losses[role] = loss
        seconds = (time.monotonic() - self._started_at) / (updates - self._first)
        figures = [f"{name} {value:.4f}" for name, value in sorted(self._losses.items())]
        figures.append(f"{seconds:.2f} s/update")
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            figures.append(f"peak {peak / 2**30:.1f} GiB")
        self.update(self._task, completed=updates / self._cycle, figures="  ".join(figures))
