"""What every step is given: where it computes, at which size, and how it keeps what it finds."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one step."""

    folder: Path
    """The session's; removed at its end."""
    result: Path
    device: str
    quick: bool
    layers: int | None = None
    """Of the transformer, where fewer than the model's fit the time."""
    clip: Path | None = None
    """What in-loop training decodes; None: one is made."""

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def keep(self, found: Any) -> None:
        """Replace the step's result, whole or not at all: what ends early keeps the last."""
        replace_text(self.result, json.dumps(found))

    def wait(self) -> None:
        """Until the GPU has nothing to do."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """The median, after one that warms up."""
        taken = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    building = path.with_name(f"{path.name}.tmp")
    building.write_text(text + "\n")
    building.replace(path)


def first_line(error: BaseException) -> str:
    """For a table."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
