"""What files of object stores were found to hold, so that a rerun does not download them to see.

Beside the digests (`shared.hashing.FileHasher`), in the same way: a lost line costs one download.
"""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from preprocess.media import Kind, Probe
from shared.hashing import cache_folder
from shared.memo import note, recall

# Raised when media are read another way: what was found before does not count then.
_VERSION = 1


class ProbeMemo:
    """(stamp of a file, kind) → Probe, in one append-only JSON-lines file."""

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo or cache_folder() / "probes.jsonl"
        self._known: dict[tuple[str, Kind], Probe] = {}
        for record in recall(self._memo):
            with suppress(KeyError, TypeError):
                if record["version"] == _VERSION:
                    name = record["file"], record["kind"]
                    self._known[name] = Probe(**record["probe"])

    def known(self, name: str, kind: Kind) -> Probe | None:
        """What the file of this stamp holds, if it was opened before."""
        return self._known.get((name, kind))

    def remember(self, name: str, kind: Kind, probe: Probe) -> None:
        """Note what a file held whose stamp was taken before it was opened."""
        self._known[name, kind] = probe
        record = {"version": _VERSION, "file": name, "kind": kind, "probe": asdict(probe)}
        note(self._memo, [record])
