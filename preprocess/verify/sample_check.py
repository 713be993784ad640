"""What a sample must be, from its shard's fingerprint and bucket; and whether it is. No I/O."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from shared.errors import json_kind
from shared.format.buckets import SIDES, Bucket, bucket_of, is_bucket
from shared.format.fingerprint import (
    Fingerprint,
    condition_tensor,
    state_timesteps,
)
from shared.format.overlays import required_members
from shared.format.prompts import VALIDATION
from shared.format.schema import (
    CONDITION_MEMBER,
    DTYPES,
    INFO_FIELDS,
    JSON_MEMBER,
    LATENTS_MEMBER,
    LATER_FIELDS,
    MOST_INFO_BYTES,
    STATES_MEMBER,
    TEXT_MEMBER,
    unpack,
)
from shared.format.strict_json import Fields, misfits, parse
from shared.format.tensor_header import read_header

# Bytes of a member beyond its tensors, or of a whole JSON, that nobody needs.
_MOST_OVERHEAD = MOST_INFO_BYTES
_LONGEST_SIDE = 1 << 14
# Two encodings of one frame differ by rounding at most, and where a GPU adds in another order.
_ROUNDING = 0.02
_OF_SPREAD = 0.1


@dataclass(frozen=True)
class Problem:
    """What is wrong with a sample; `preprocess.verify.findings` has the codes."""

    code: str
    found: str
    expected: str
    member: str | None = None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a shard's fingerprint and bucket say of each of its samples."""

    bucket: Bucket | None
    """None in the prompt bank, whose entries say it each for itself (`of_prompt`)."""
    required: tuple[str, ...]
    allowed: tuple[str, ...]
    latents: tuple[int, ...] | None
    """(C, T, h, w); None where there are none."""
    states: tuple[int, ...] | None
    """(S, C, T, h, w) of a synthesised cache's; None where there are none."""
    latents_dtype: torch.dtype | None
    clip_dim: int | None
    """Width of the CLIP embeddings that lie beside a condition; None where there are none."""
    text_dim: int | None
    text_length: int | None
    text_dtype: torch.dtype | None
    grid: tuple[int, tuple[int, int, int]] | None
    """Channels and strides (t, h, w) of latents; None where there are none."""
    mode: str | None
    synthesised: bool
    """The clips are a model's own: their first frame is only near that of the condition."""
    condition: str | None
    """Name of the condition's tensor; None where samples have none."""

    @classmethod
    def of(cls, fingerprint: Fingerprint, bucket: Bucket | None) -> "Expected":
        """Raises KeyError, TypeError or ValueError for a fingerprint that lacks a field."""
        required = required_members(fingerprint) if bucket else (JSON_MEMBER, TEXT_MEMBER)
        own, shape, grid = fingerprint.get("latents"), None, None
        if own is not None:
            time, high, wide = map(int, own["stride"])
            grid = int(own["channels"]), (time, high, wide)
        if bucket is not None and grid is not None:
            shape = bucket.latent_shape(*grid)
        text = fingerprint.get("text") if TEXT_MEMBER in required else None
        mode = fingerprint["mode"] if LATENTS_MEMBER in required else fingerprint.get("mode")
        condition = condition_tensor(mode)
        if LATENTS_MEMBER in required and condition is not None:
            required = (*required, CONDITION_MEMBER)
        states = None
        if bucket is not None and (timesteps := state_timesteps(fingerprint)):
            required = (*required, STATES_MEMBER)
            states = None if shape is None else (len(timesteps), *shape)
        return cls(
            bucket=bucket,
            required=required,
            # Validation prompts may begin with a picture.
            allowed=required if bucket or own is None else (*required, CONDITION_MEMBER),
            latents=shape,
            states=states,
            latents_dtype=None if own is None else DTYPES[own["dtype"]],
            clip_dim=int(fingerprint["image"]["dim"]) if "image" in fingerprint else None,
            text_dim=None if text is None else int(text["dim"]),
            text_length=None if text is None else int(text["max_length"]),
            text_dtype=None if text is None else DTYPES[text["dtype"]],
            grid=grid,
            mode=mode,
            synthesised="synthesis" in fingerprint,
            condition=condition,
        )

    def of_prompt(self, info: dict[str, Any]) -> "Expected":
        """What the bank's entry with this `KEY.json` must hold beside its text."""
        if self.grid is None or not is_bucket(info):
            return self
        bucket = bucket_of(info)
        if max(bucket.height, bucket.width, bucket.frames) > _LONGEST_SIDE:
            return self
        if self.mode == "ti2v":
            bucket = replace(bucket, frames=1)  # the picture by itself
        return replace(self, latents=bucket.latent_shape(*self.grid))

    def most_bytes(self, suffix: str) -> int:
        """More than this a member cannot have, so a hostile one never fills the memory."""
        tensor = 0
        if suffix == TEXT_MEMBER and self.text_dim and self.text_length:
            tensor = 4 * self.text_dim * self.text_length
        elif suffix in (LATENTS_MEMBER, CONDITION_MEMBER, STATES_MEMBER):
            shape = self.states if suffix == STATES_MEMBER else self.latents
            tensor = 4 * torch.Size(shape or (0,)).numel()
        return _MOST_OVERHEAD + tensor


_PROMPT_FIELDS: Fields = {"role": str, "prompt": str, "image": str, "last_image": str}
_FORMAT = "what shards/README.md says"


def check_info(data: bytes, expected: Expected) -> tuple[list[Problem], dict[str, Any]]:
    """Problems of `KEY.json`, and the object itself, which is empty where there is none."""
    try:
        info = parse(data, most=MOST_INFO_BYTES)
    except ValueError as error:
        return [Problem("json-damaged", f"no JSON ({error})", "a JSON object")], {}
    if not isinstance(info, dict):
        return [Problem("json-damaged", json_kind(info), "an object")], {}
    if expected.bucket is None:
        wrong = misfits(info, _PROMPT_FIELDS, optional=("image", "last_image"))
        if info.get("role") == VALIDATION and not is_bucket(info):
            sides = ", ".join(f"{side} {info.get(side)!r:.20}" for side in SIDES)
            wrong["bucket"] = f"a shape of {sides}"
    else:
        wrong = misfits(info, INFO_FIELDS, optional=LATER_FIELDS)
    problems = [Problem("json-field", found, _FORMAT) for found in wrong.values()]
    if expected.bucket is not None:
        problems += _check_bucket(info, expected.bucket, wrong)
    return problems, info


def _check_bucket(
    info: dict[str, Any], bucket: Bucket, wrong: Collection[str]
) -> Iterator[Problem]:
    for name in ("width", "height", "frames"):
        if name not in wrong and info[name] != getattr(bucket, name):
            yield Problem(
                "json-bucket", f"{name} {info[name]}", f"{getattr(bucket, name)}, as its shard says"
            )
    if "frame_indices" in wrong or info.get("type") == "text":
        return
    indices = info["frame_indices"]
    if len(indices) != bucket.frames:
        yield Problem("json-bucket", f"{len(indices)} frame_indices", f"{bucket.frames} of them")
    if indices != sorted(indices):
        yield Problem("json-field", "frame_indices that do not ascend", "numbers of frames")


def check_tensors(
    suffix: str, data: bytes, expected: Expected
) -> tuple[list[Problem], torch.Tensor | None]:
    """Problems of a safetensors member and its main tensor: always of text, else if it has none."""
    name = suffix.partition(".")[0]
    main = expected.condition or name if suffix == CONDITION_MEMBER else name
    try:
        header = read_header(data, len(data))
    except ValueError as error:
        damage = Problem("tensor-damaged", f"no safetensors ({error})", "a safetensors file")
        return [damage], None
    try:
        tensors = unpack(data, suffix)
    except ValueError as error:
        code = f"{name}-shape" if list(header) == [main] else "tensor-name"
        return [Problem(code, str(error), "that")], None
    if main not in tensors:  # the mask that belongs to it would be another
        return [Problem("tensor-name", f"{sorted(tensors)}", repr(main))], None
    problems = list(_check_values(suffix, main, tensors, expected))
    return problems, tensors[main] if suffix == TEXT_MEMBER or not problems else None


def _check_values(
    suffix: str, main: str, tensors: dict[str, torch.Tensor], expected: Expected
) -> Iterator[Problem]:
    name, tensor = suffix.partition(".")[0], tensors[main]
    dtype = expected.text_dtype if suffix == TEXT_MEMBER else expected.latents_dtype
    if dtype is not None and tensor.dtype != dtype:
        yield Problem("dtype", _dtype(tensor.dtype), _dtype(dtype))
    ranges = {other: _range(values) for other, values in tensors.items()}
    for other, values in tensors.items():
        if not all(map(math.isfinite, ranges[other])):
            bad = values.numel() - int(torch.isfinite(values).sum())
            found = f"{bad} of {values.numel()} values of {other} are NaN or infinite"
            yield Problem("not-finite", found, "none")
    if suffix == CONDITION_MEMBER:
        yield from _check_clip(tensors.get("clip"), expected)
    if suffix == TEXT_MEMBER:
        shape_is_right = (
            tensor.ndim == 2
            and tensor.shape[1] == expected.text_dim
            and 1 <= len(tensor) <= (expected.text_length or 0)
        )
        if not shape_is_right:
            yield Problem(
                "text-shape",
                f"shape {tuple(tensor.shape)}",
                f"1 to {expected.text_length} rows of {expected.text_dim}",
            )
        elif ranges[main] == (0, 0):
            yield Problem("text-zero", f"{len(tensor)} rows of zeros", "an embedding")
    elif tuple(tensor.shape) != (
        shape := expected.states if suffix == STATES_MEMBER else expected.latents
    ):
        yield Problem(f"{name}-shape", f"shape {tuple(tensor.shape)}", f"{shape}")
    elif ranges[main][0] == ranges[main][1]:
        yield Problem(f"{name}-constant", f"only {ranges[main][0]:g}", "values that vary")


def _check_clip(clip: torch.Tensor | None, expected: Expected) -> Iterator[Problem]:
    """CLIP embeddings (tokens, D) are there where the fingerprint says so; zeros for images."""
    of_images = expected.bucket is not None and expected.bucket.frames == 1
    if (clip is None) != (expected.clip_dim is None):
        has, wanted = ("no clip", "it") if clip is None else ("a clip", "none: no model has one")
        yield Problem("tensor-name", has, wanted)
    elif clip is not None and clip.shape[1] != expected.clip_dim:
        yield Problem("clip-shape", f"shape {tuple(clip.shape)}", f"rows of {expected.clip_dim}")
    elif clip is not None and clip.dtype != expected.latents_dtype:
        yield Problem("dtype", f"clip {_dtype(clip.dtype)}", f"{expected.latents_dtype}")
    elif clip is not None and _range(clip) == (0, 0) and not of_images:
        yield Problem("clip-zero", f"{len(clip)} rows of zeros", "an embedding")


def _range(values: torch.Tensor) -> tuple[float, float]:
    """Lowest and highest value, NaN if any is: one fast pass that tells all that is asked."""
    low, high = torch.aminmax(values)
    return float(low), float(high)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_condition(latents: torch.Tensor | None, cond: torch.Tensor | None) -> Iterator[Problem]:
    """The VAE is causal: first latent frame of a video's condition = that of its latents.

    A single frame, also of a video, has the encoding of zeros.
    """
    if latents is None or cond is None or latents.shape[1] == 1:
        return
    own, first = latents[:, 0].float(), cond[:, 0].float()  # (C, h, w)
    off = float((own - first).abs().mean())
    spread = float((own - own.mean(dim=(1, 2), keepdim=True)).abs().mean())
    if off > _ROUNDING + _OF_SPREAD * spread:
        yield Problem(
            "cond-foreign",
            f"its first frame is {off:.2f} off the latents', which vary by {spread:.2f}",
            "the same frame",
            CONDITION_MEMBER,
        )
