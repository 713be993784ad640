"""Small things that this machine has found out, in append-only files of JSON lines.

Nothing hangs on them: a line that is lost, torn or of another kind costs the time to find it again.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def recall(memo: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, oldest first; none where it cannot be read."""
    lines: list[str] = []
    with suppress(OSError):
        lines = memo.read_text(errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def note(memo: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a file. One that cannot be written costs time, nothing else."""
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        with memo.open("a") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)
