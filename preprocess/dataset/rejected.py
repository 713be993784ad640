"""`rejected.jsonl`: what the last run left out, and why; a line for each."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from preprocess.dataset.entries import Rejected
from preprocess.encode.ranks import Rank
from shared.io.durable import remove, write_bytes


def rejected_file(folder: Path, rank: Rank) -> Path:
    """Where this rank lists what it rejected."""
    return folder / ("rejected.jsonl" if rank.number == 0 else f"rejected-w{rank.number:03d}.jsonl")


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """The whole list, or no file where nothing was rejected."""
    if rejected:
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected]
        write_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))
    else:
        remove(path)
