"""A sample on disk: member names, tensor names, the key, and packing.

`shards/README.md` is the specification of this module for readers in other languages.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import safetensors.torch
import torch

from shared.buckets import Bucket
from shared.hashing import digest_of

# Suffix after the key's dot → the tensors inside. Order is the order in the tar.
JSON_MEMBER = "json"
LATENTS_MEMBER = "latents.safetensors"
TEXT_MEMBER = "text.safetensors"
CONDITION_MEMBER = "cond.safetensors"
MEMBERS = (JSON_MEMBER, LATENTS_MEMBER, TEXT_MEMBER, CONDITION_MEMBER)

KEY_BYTES = 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

MediaType = Literal["video", "image", "text"]


def sample_key(media_sha256: str, transform: dict[str, Any], caption_ordinal: int) -> str:
    """32 hex digits from content: the media bytes, what was cut out of them, and which caption.

    No path, time or position enters, so the same sample has the same key on every machine, and
    the key holds no dot (WebDataset splits member names at the first one).
    """
    return digest_of([media_sha256, transform, caption_ordinal])[: 2 * KEY_BYTES]


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """`KEY.json`: what a person or a filter wants to know about a sample."""

    caption: str
    type: MediaType
    source: str
    """Path as given in the dataset (relative to its folder where it lies inside)."""
    width: int
    height: int
    frames: int
    frame_indices: list[int]
    """Which frames of the source, in order; [0] for an image."""
    fps: float | None
    """Frames per second of the source; None for an image."""
    source_width: int
    source_height: int
    repeats: int = 1
    """How often an epoch shows the sample."""
    tags: list[str] = field(default_factory=list)

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.height, self.width, self.frames)

    def to_bytes(self) -> bytes:
        fields = asdict(self)
        if self.repeats == 1:  # what readers take it for, and what the first caches have
            del fields["repeats"]
        return json.dumps(fields, ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One encoded sample. Tensors are on the CPU, in the cache's dtype."""

    key: str
    info: SampleInfo
    latents: torch.Tensor
    """(C, T, H, W), normalised: (x − mean)·(1/std)."""
    text: torch.Tensor
    """(tokens, D) at the caption's true length; training pads with zeros to 512."""
    cond: torch.Tensor | None = None
    """(C, T, H, W), normalised encoding of [first frame, zeros …]; i2v caches only."""

    def members(self) -> dict[str, bytes]:
        """Suffix → bytes, in tar order."""
        packed = {
            JSON_MEMBER: self.info.to_bytes(),
            LATENTS_MEMBER: pack(latents=self.latents),
            TEXT_MEMBER: pack(text=self.text),
        }
        if self.cond is not None:
            packed[CONDITION_MEMBER] = pack(cond=self.cond)
        return packed


def pack(**tensors: torch.Tensor) -> bytes:
    """safetensors bytes of the named tensors."""
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})


def unpack(data: bytes) -> dict[str, torch.Tensor]:
    """The named tensors of safetensors bytes. Raises safetensors.SafetensorError on bad bytes."""
    return safetensors.torch.load(data)
