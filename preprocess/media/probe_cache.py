"""What files were found to hold, so that a rerun need not decode (or download) them to see.

Beside the digests (`shared.io.hashing.FileHasher`), in the same way: a lost line costs one probe.
"""

import base64
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocess.frames.media_info import KeyFrames, Kind, Probe
from preprocess.frames.orientation import Orientation
from shared.io.hashing import cache_folder
from shared.io.memo import note, recall

# Raised when media are read another way: what was found before does not count then.
_VERSION = 3


class ProbeMemo:
    """(stamp of a file, kind) → Probe, in one append-only JSON-lines file."""

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo or cache_folder() / "probes.jsonl"
        self._known: dict[tuple[str, Kind], dict[str, Any]] = {}
        for record in recall(self._memo):
            with suppress(KeyError, TypeError):
                if record["version"] == _VERSION:
                    self._known[record["file"], record["kind"]] = record["probe"]

    def known(self, name: str, kind: Kind) -> Probe | None:
        """What the file of this stamp holds, if it was opened before. Once: it is not kept then.

        A film's frames take some hundred kilobytes, and a dataset may have many films.
        """
        with suppress(KeyError, TypeError, ValueError):
            return _unpacked(self._known.pop((name, kind)))
        return None

    def remember(self, name: str, kind: Kind, probe: Probe) -> None:
        """Note what a file held whose stamp was taken before it was opened."""
        packed = asdict(probe, dict_factory=_packed_fields)
        record = {"version": _VERSION, "file": name, "kind": kind, "probe": packed}
        note(self._memo, [record])


def _packed_fields(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """As JSON: bytes in base 85, without what is None."""
    return {
        name: base64.b85encode(value).decode() if isinstance(value, bytes) else value
        for name, value in fields
        if value is not None
    }


def _unpacked(fields: dict[str, Any]) -> Probe:
    """The inverse. Raises KeyError, TypeError or ValueError for anything else."""
    fields = {"fps": None, **fields, "notes": tuple(fields["notes"])}
    if "times" in fields:
        fields["times"] = base64.b85decode(fields["times"])
    if "key_frames" in fields:
        found = fields["key_frames"]
        fields["key_frames"] = KeyFrames(
            first=found["first"],
            digests=base64.b85decode(found["digests"]),
            places=tuple((int(number), int(pts)) for number, pts in found["places"]),
            orientation=Orientation(**found["orientation"]),
        )
    return Probe(**fields)
