"""Progress bars, and how counts and long lists read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shared.io.names import on_one_line

MOST_NAMED = 3  # of a long list, so many are named


def count(number: int, noun: str) -> str:
    """1 sample, 2 samples."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Bar:
    """One progress bar; calling it advances by one."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Bar]:
    """A progress bar while the block runs; none where there is nothing to do."""
    progress = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=total == 0,
    )
    with progress:
        yield Bar(progress, progress.add_task(title, total=total))


@contextmanager
def byte_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes while the block runs; what it yields takes how many came."""
    progress = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=total == 0,
    )
    with progress:
        task = progress.add_task(title, total=total)
        yield lambda number: progress.advance(task, number)


def named(names: Sequence[str]) -> str:
    """The first few, each on one line, and how many more there are."""
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*map(on_one_line, names[:MOST_NAMED]), *more])
