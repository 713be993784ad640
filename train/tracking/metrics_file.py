"""`metrics.jsonl` of a run: the numbers of each update, a line each, whichever trackers there are.

The run's page draws its charts from it.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from shared.errors import UserError
from shared.io.durable import write_bytes
from shared.io.memo import recall
from train.tracking.trackers import Tracker

METRICS = "metrics.jsonl"
UPDATE = "update"


class MetricsFile(Tracker):
    """Lines of JSON: `update`, and the numbers by their names in trackers, null for one that is
    none (NaN)."""

    def __init__(self, path: Path, *, done: int) -> None:
        """Keeps the lines of the first `done` updates of a file that is there, each once.

        UserError where it can't be written, or has lines and none of a run's.
        """
        self._path = path
        self._torn = False
        if path.exists():
            if (
                path.is_file()
                and path.stat().st_size
                and not any(UPDATE in x for x in recall(path))
            ):
                raise UserError(
                    f"--output-dir: {path} is not a run's: no line of it has a number of updates. "
                    "Move it elsewhere, or give another folder."
                )
            kept = "".join(json.dumps(one) + "\n" for one in read_metrics(path, done))
            try:
                write_bytes(path, kept.encode())
            except OSError as error:
                raise UserError(
                    f"--output-dir: can't write {path} ({error.strerror}). Free some space there, "
                    "or remove what is in its place."
                ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A line that can't be written, as on a full disk, is left out: training goes on."""
        plain = {name: x if math.isfinite(x) else None for name, x in values.items()}
        line = ("\n" if self._torn else "") + json.dumps({UPDATE: step, **plain}) + "\n"
        self._torn = True
        with suppress(OSError):
            with self._path.open("a") as stream:
                stream.write(line)
            self._torn = False


def read_metrics(path: Path, done: int) -> list[dict[str, float | None]]:
    """The lines of the first `done` updates, in their order, each once; a torn one is left out."""
    found = {
        record[UPDATE]: record
        for record in recall(path)
        if isinstance(record.get(UPDATE), int) and record[UPDATE] <= done
    }
    return [found[update] for update in sorted(found)]
