"""A sample on disk: member names, tensor names, the key, and packing.

`shards/README.md` is the specification of this module for readers in other languages.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError

from shared.format.buckets import Bucket
from shared.format.strict_json import Fields, is_count, is_list, parse, require
from shared.format.tensor_header import TensorHeader, read_header
from shared.io.hashing import digest_of

# Suffix after the key's dot → the tensors inside. Order is the order in the tar.
JSON_MEMBER = "json"
LATENTS_MEMBER = "latents.safetensors"
TEXT_MEMBER = "text.safetensors"
CONDITION_MEMBER = "cond.safetensors"
STATES_MEMBER = "states.safetensors"
MEMBERS = (JSON_MEMBER, LATENTS_MEMBER, TEXT_MEMBER, CONDITION_MEMBER, STATES_MEMBER)

# A safetensors member → tensors of which exactly one must be there, all that may be with their
# dimensions.
_TENSORS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    LATENTS_MEMBER: (("latents",), {"latents": 4}),
    TEXT_MEMBER: (("text",), {"text": 2}),
    CONDITION_MEMBER: (("cond", "first_last"), {"cond": 4, "first_last": 4, "clip": 2}),
    STATES_MEMBER: (("states",), {"states": 5}),
}

KEY_BYTES = 16
MEDIA_TYPES = ("video", "image", "text")
MOST_INFO_BYTES = 1 << 24
"""Of `KEY.json`, which is mostly a caption."""
MOST_REPEATS = 1_000_000
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
"""By the names of `tensor_header.ITEM_BYTES`."""

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
    """Which frames of the source, counted as they are shown; [0] for an image."""
    fps: float | None
    """Frames per second of the source; None for an image."""
    source_width: int | None
    source_height: int | None
    """None without a medium, where `source` is "", `frame_indices` empty and `fps` None."""
    repeats: int = 1
    """How often an epoch shows the sample."""
    tags: list[str] = field(default_factory=list)
    frame_rule: int = 1
    """2: the first frame rule may have read other pictures of this source, and the key says so."""

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.height, self.width, self.frames)

    def to_bytes(self) -> bytes:
        fields = asdict(self)
        for name in ("repeats", "frame_rule"):
            if fields[name] == 1:  # what readers take it for, and what the first caches have
                del fields[name]
        return info_bytes(fields)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One encoded sample. Tensors are on the CPU, in the cache's dtype."""

    key: str
    info: SampleInfo
    latents: torch.Tensor | None
    """(C, T, H, W), normalised: (x − mean)·(1/std). None where there is only a caption."""
    text: torch.Tensor
    """(tokens, D) at the caption's true length; training pads with zeros to 512."""
    cond: torch.Tensor | None = None
    """(C, T, H, W), normalised encoding of [first frame, zeros …]; i2v caches only."""
    first_last: torch.Tensor | None = None
    """The same of [first frame, zeros …, last frame], in its place; flf2v caches only."""
    clip: torch.Tensor | None = None
    """(tokens, D), the CLIP vision model's view of the given frames; Wan 2.1 caches only."""
    states: torch.Tensor | None = None
    """(S, C, T, H, W), a sampler's x_t at S timesteps, the noisiest first; it ended at `latents`.
    In synthesised caches with states only."""

    def members(self) -> dict[str, bytes]:
        """Suffix → bytes, in tar order."""
        packed = {JSON_MEMBER: self.info.to_bytes()}
        if self.latents is not None:
            packed[LATENTS_MEMBER] = pack(latents=self.latents)
        packed[TEXT_MEMBER] = pack(text=self.text)
        if condition := pack_condition(self):
            packed[CONDITION_MEMBER] = condition
        if self.states is not None:
            packed[STATES_MEMBER] = pack(states=self.states)
        return packed


def info_bytes(fields: Mapping[str, Any]) -> bytes:
    """`KEY.json` of these fields."""
    return json.dumps(fields, ensure_ascii=False).encode()


def pack(**tensors: torch.Tensor | None) -> bytes:
    """safetensors bytes of the named tensors; None stands for one that there is not."""
    there = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    return safetensors.torch.save(there)


class Conditioned(Protocol):
    """What may have a condition: a sample, a prompt."""

    @property
    def cond(self) -> torch.Tensor | None: ...
    @property
    def first_last(self) -> torch.Tensor | None: ...
    @property
    def clip(self) -> torch.Tensor | None: ...


def pack_condition(one: Conditioned) -> bytes:
    """`KEY.cond.safetensors`; empty where there is none."""
    if one.cond is None and one.first_last is None:
        return b""
    return pack(cond=one.cond, first_last=one.first_last, clip=one.clip)


def tensors_in(head: bytes, total: int, member: str) -> Mapping[str, TensorHeader]:
    """Shapes and dtypes of a safetensors member of `total` bytes, from its beginning.

    Raises ValueError unless they are what such a member may hold.
    """
    found = read_header(head, total)
    needed, allowed = _TENSORS[member]
    if len(found.keys() & set(needed)) != 1 or not found.keys() <= allowed.keys():
        raise ValueError(f"it holds {sorted(found)}, expected {' or '.join(map(repr, needed))}")
    for name, tensor in found.items():
        if len(tensor.shape) != allowed[name]:
            raise ValueError(
                f"{name} has shape {tensor.shape}, expected {allowed[name]} dimensions"
            )
    return found


def unpack(data: bytes, member: str) -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors member. Raises ValueError on anything else."""
    tensors_in(data, len(data), member)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _is_positive(value: object) -> bool:
    return is_count(value, least=1)


INFO_FIELDS: Fields = {
    "caption": str,
    "type": lambda value: value in MEDIA_TYPES,
    "source": str,
    "width": _is_positive,
    "height": _is_positive,
    "frames": _is_positive,
    "frame_indices": lambda value: is_list(value, is_count),
    "repeats": lambda value: is_count(value, least=1, most=MOST_REPEATS),
    "frame_rule": _is_positive,
}
"""Of `KEY.json`."""
LATER_FIELDS = ("repeats", "frame_rule")
"""Of these, which older shards do not have: 1 where they are missing."""


def unpack_info(data: bytes) -> dict[str, Any]:
    """`KEY.json` as an object with at least `INFO_FIELDS`. Raises ValueError."""
    info = parse(data, most=MOST_INFO_BYTES)
    if not isinstance(info, dict):
        raise ValueError("no JSON object")
    require(info, INFO_FIELDS, optional=LATER_FIELDS)
    return info


def seconds_of(info: dict[str, Any]) -> float | None:
    """How long a clip is: its frames at the rate at which they were taken; None for an image."""
    indices, fps = info["frame_indices"], info.get("fps")
    if not isinstance(fps, int | float) or not 0 < fps < math.inf or info.get("type") != "video":
        return None
    step = (indices[-1] - indices[0]) / (len(indices) - 1) if len(indices) > 1 else 1
    return float(len(indices) * step / fps)
