"""`rejected.jsonl`: what the last run left out, and why; and the lines that say so."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.cli.console import MOST_NAMED
from shared.io.durable import write_bytes
from shared.io.names import on_one_line
from shared.io.store import Store


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """Something of a dataset that cannot be used."""

    source: str
    reason: str


def _file(store: Store, rank: int) -> Path:
    """Where the rank of that number lists what it rejected."""
    return store.folder / ("rejected.jsonl" if rank == 0 else f"rejected-w{rank:03d}.jsonl")


def write_rejected(store: Store, rank: int, rejected: Sequence[Rejected]) -> None:
    """The whole list of this rank, or no file where nothing was rejected."""
    path = _file(store, rank)
    if rejected:
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected]
        data = "".join(lines).encode("utf-8", "backslashreplace")
        write_bytes(path, data, commit=store.commit)
    else:
        store.remove(path)


def reasons(rejected: Sequence[Rejected]) -> list[str]:
    """A line each for the first few: source and reason."""
    return [
        "  " + on_one_line(f"{item.source}: " + item.reason.replace("\n", " "))
        for item in rejected[:MOST_NAMED]
    ]


def rejections(rejected: Sequence[Rejected], store: Store, rank: int) -> str:
    """The first few rejected samples with their reasons, and where all of them are listed."""
    lines = reasons(rejected)
    if len(rejected) > MOST_NAMED:
        lines.append(f"  ... {len(rejected) - MOST_NAMED} more")
    listed_in = store.shown(_file(store, rank))
    return "\n".join([f"{len(rejected)} rejected, listed in {listed_in}:", *lines])
