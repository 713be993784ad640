"""Small things that this machine has found out: JSON lines in append-only files, or bytes.

Nothing hangs on them: what is lost, torn or of another kind costs the time to find it again.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from shared.io.durable import write_bytes


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


def remembered(memo: Path, size: int, work: Callable[[], bytes]) -> bytes:
    """The `size` bytes that `work` gives, from a file that keeps them with their SHA-256."""
    with suppress(OSError):
        data = memo.read_bytes()
        if data[:32] == sha256(data[32:]).digest() and len(data) == 32 + size:
            return data[32:]
    found = work()
    with suppress(OSError):  # it would have saved time
        write_bytes(memo, sha256(found).digest(), found)
    return found
