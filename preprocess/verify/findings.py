"""What `wanprep verify` can find: the codes, and one finding in words and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "note"]

# Code → what it means. docs/caches.md lists them for people.
CODES = {
    "sidecar-missing": "a tar without its sidecar: not committed, readers skip it",
    "sidecar-damaged": "a sidecar that cannot be read, or whose fields make no sense",
    "tar-missing": "a sidecar whose tar is gone",
    "size": "the tar has another size than its sidecar says",
    "checksum": "the tar's bytes are not those that were written (SHA-256)",
    "tar-truncated": "the tar ends early",
    "tar-damaged": "a tar header that cannot be read, or bytes where there should be none",
    "count": "the tar holds another number of samples than its sidecar says",
    "fingerprint-mixed": "a shard that was made with other settings than the rest",
    "member-unexpected": "a member that has no place in such a shard",
    "member-missing": "a sample without one of its members",
    "member-duplicate": "a member that is there twice",
    "member-order": "members of a sample in another order than the format's",
    "key-duplicate": "a sample that is there twice in one shard",
    "json-damaged": "KEY.json that cannot be read",
    "json-field": "a field of KEY.json that is missing or of the wrong kind",
    "json-bucket": "KEY.json that disagrees with the bucket of its shard",
    "tensor-damaged": "a safetensors file that cannot be read",
    "tensor-name": "a safetensors file that holds other tensors than it should",
    "dtype": "a tensor of another dtype than the fingerprint says",
    "latents-shape": "latents of another shape than bucket and fingerprint give",
    "latents-constant": "latents that are one value throughout",
    "cond-shape": "a condition of another shape than the latents",
    "cond-constant": "a condition that is one value throughout",
    "cond-foreign": "a condition whose first frame is not the latents' first frame",
    "clip-shape": "CLIP embeddings of another width than the fingerprint says",
    "clip-zero": "CLIP embeddings that are all zeros",
    "text-shape": "text of another width than the fingerprint says, or longer than its maximum",
    "text-zero": "text that is all zeros",
    "not-finite": "NaN or infinite values",
    "tombstones-damaged": "a list of removed samples that cannot be read",
    "prompt-missing": "the prompt bank lacks the empty or the negative prompt",
    "manifest-damaged": "manifest.json is missing or cannot be read",
    "index-damaged": "index.zarr is missing or cannot be read",
    "index-stale": "manifest.json and index.zarr are not of the shards that are there",
    "index-row": "a row of the index that is not what its tar holds",
    "overlay-foreign": "conditions that were made with another VAE than the latents",
    "overlay-orphans": "captions or conditions of samples that the cache has no more",
    "frames-misread": "other pictures than the source shows, read under the first frame rule",
    "frames-order": "decoded frames are those of other places in the source",
    "psnr": "decoded frames are far from the source's",
    "source-missing": "the source of a decoded sample is not there to compare with",
}


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
