"""What `wanprep verify` can find: the codes, and one finding in words and as JSON."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "note"]

# Codes by what they are about. docs/caches.md says what each means.
OF_SHARDS = ("sidecar-missing", "sidecar-damaged", "tar-missing", "tombstones-damaged")
OF_TARS = ("size", "checksum", "tar-truncated", "tar-damaged", "count", "fingerprint-mixed")
OF_MEMBERS = (
    *("member-unexpected", "member-missing", "member-duplicate", "member-order", "key-duplicate"),
    *("json-damaged", "json-field", "tensor-damaged", "tensor-name"),
)
"""Those that keep a tar from being indexed."""
OF_VALUES = (
    *("json-bucket", "dtype", "not-finite", "latents-shape", "latents-constant", "cond-shape"),
    *("cond-constant", "cond-foreign", "clip-shape", "clip-zero", "text-shape", "text-zero"),
    *("states-shape", "states-constant"),
)
OF_CACHES = (
    *("prompt-missing", "manifest-damaged", "index-damaged", "index-stale", "index-row"),
    *("overlay-foreign", "overlay-orphans"),
)
OF_SOURCES = ("frames-misread", "frames-order", "psnr", "source-missing")
CODES = frozenset((*OF_SHARDS, *OF_TARS, *OF_MEMBERS, *OF_VALUES, *OF_CACHES, *OF_SOURCES))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong (`error`), or worth knowing (`note`)."""

    severity: Severity
    code: str
    """One of `CODES`."""
    file: str
    """Relative to the folder of the cache."""
    key: str | None = None
    member: str | None = None
    """Suffix after the key, such as latents.safetensors."""
    found: str
    expected: str
    cure: str = ""

    def __post_init__(self) -> None:
        assert self.code in CODES, self.code

    def __str__(self) -> str:
        """One line, without the cure."""
        place = self.file
        if self.key is not None:
            place += f": {self.key}" + (f".{self.member}" if self.member else "")
        return f"{self.severity:<5} {self.code:<16} {place}: {self.found}; expected {self.expected}"
