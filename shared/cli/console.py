"""Progress bars, and how counts and long lists read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
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


@contextmanager
def bar(
    console: Console, title: str, total: int, *, of_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar while the block runs; none where there is nothing to do.

    What it yields advances it: by one, or by the number that it is given.
    """
    counts = (DownloadColumn(), TransferSpeedColumn())
    progress = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        *(counts if of_bytes else (MofNCompleteColumn(), TimeElapsedColumn())),
        TimeRemainingColumn(),
        console=console,
        disable=total == 0,
    )
    with progress:
        yield partial(progress.advance, progress.add_task(title, total=total))


def named(names: Sequence[str]) -> str:
    """The first few, each on one line, and how many more there are."""
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*map(on_one_line, names[:MOST_NAMED]), *more])
