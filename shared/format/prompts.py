"""The prompt bank: embeddings of prompts that belong to no sample, in small tars of their own.

`shards/README.md` (The prompt bank) is the specification. Training wants the empty and the negative
prompt; validation prompts are what a run samples while it trains, with what an image-to-video model
needs beside the text, so that no encoder has to be there then.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import torch

from shared.errors import UserError
from shared.format.buckets import SIDES, Bucket, bucket_of, is_bucket
from shared.format.cache import Sidecar
from shared.format.schema import (
    CONDITION_MEMBER,
    JSON_MEMBER,
    KEY_BYTES,
    MOST_INFO_BYTES,
    TEXT_MEMBER,
    info_bytes,
    pack,
    pack_condition,
    unpack,
)
from shared.format.strict_json import parse
from shared.format.tar import Member, members
from shared.io.hashing import digest_of
from shared.io.store import Store
from shared.models.spec import MAX_TEXT_TOKENS

EMPTY, NEGATIVE, VALIDATION = "empty", "negative", "validation"
PROMPT_MEMBERS = (JSON_MEMBER, TEXT_MEMBER, CONDITION_MEMBER)

_MOST_PROMPT_BYTES = 1 << 26
"""Of one member: 512 tokens of 32,768 numbers."""


@dataclass(frozen=True)
class Prompt:
    """An entry of the prompt bank. What follows `text` is only for validation prompts."""

    role: str
    prompt: str
    text: torch.Tensor
    """(tokens, D) at the prompt's true length."""
    bucket: Bucket | None = None
    """What is to be made of it."""
    image: str | None = None
    """SHA-256 of the picture that it begins with."""
    last_image: str | None = None
    """The same of the one that it ends with."""
    cond: torch.Tensor | None = None
    """Of that picture, normalised: (C, T, h, w) as a sample's for i2v, (C, 1, h, w) for ti2v."""
    first_last: torch.Tensor | None = None
    """Of both pictures in its place, as a sample's, for flf2v."""
    clip: torch.Tensor | None = None
    """(tokens, D) of CLIP, for Wan 2.1 i2v and flf2v."""

    @property
    def key(self) -> str:
        """What it is, not how it was encoded: the same in a cache and in captions beside it."""
        what: list[Any] = [self.role, self.prompt]
        if self.bucket is not None:
            what += [list(asdict(self.bucket).values()), self.image]
        if self.last_image is not None:
            what.append(self.last_image)
        return digest_of(what)[: 2 * KEY_BYTES]

    def members(self) -> dict[str, bytes]:
        """Suffix → bytes, in tar order."""
        info: dict[str, Any] = {"role": self.role, "prompt": self.prompt}
        if self.bucket is not None:
            info |= asdict(self.bucket)
        images = {"image": self.image, "last_image": self.last_image}
        info |= {name: image for name, image in images.items() if image is not None}
        packed = {JSON_MEMBER: info_bytes(info), TEXT_MEMBER: pack(text=self.text)}
        if condition := pack_condition(self):
            packed[CONDITION_MEMBER] = condition
        return packed


def read_prompts(store: Store, shards: tuple[str, ...]) -> list[Prompt]:
    """The prompt bank, oldest first; where a role has one prompt only, the last entry counts.

    Raises UserError naming a damaged tar.
    """
    return [prompt for name in shards for prompt in _read_shard(store, name)]


def current_validation(prompts: list[list[Prompt]]) -> list[Prompt]:
    """Of prompts by shard, oldest first, the validation prompts that count: the last list."""
    for shard in reversed(prompts):
        if found := [prompt for prompt in shard if prompt.role == VALIDATION]:
            return found
    return []


def prompts_by_shard(store: Store, shards: tuple[str, ...]) -> list[list[Prompt]]:
    """`read_prompts`, a list for each shard."""
    return [list(_read_shard(store, name)) for name in shards]


def _read_shard(store: Store, name: str) -> Iterator[Prompt]:
    path = store.folder / name
    try:
        if not path.is_file():
            raise ValueError("no file")
        with store.shard_file(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            found: dict[str, dict[str, Member]] = {}
            for member in members(stream, size, PROMPT_MEMBERS):
                found.setdefault(member.key, {})[member.suffix] = member
            for key, parts in found.items():
                if not {JSON_MEMBER, TEXT_MEMBER} <= parts.keys():
                    raise ValueError(f"{key} lacks {JSON_MEMBER} or {TEXT_MEMBER}")
                yield _prompt(parts, stream)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"shards: {store.shown(path)} is damaged ({error}). Restore it, or delete it together "
            f"with {Sidecar.path_for(path).name} and run `wanprep encode` again."
        ) from error


def _bytes_of(stream: BinaryIO, member: Member) -> bytes:
    if member.size > _MOST_PROMPT_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes")
    return member.read(stream, _MOST_PROMPT_BYTES)


def _prompt(parts: dict[str, Member], stream: BinaryIO) -> Prompt:
    info = parts[JSON_MEMBER]
    value = parse(_bytes_of(stream, info), most=MOST_INFO_BYTES)
    if not isinstance(value, dict) or {type(value.get(n)) for n in ("role", "prompt")} != {str}:
        raise ValueError(f"{info.name} has no role or no prompt")
    tensor = unpack(_bytes_of(stream, parts[TEXT_MEMBER]), TEXT_MEMBER)["text"]
    if len(tensor) > MAX_TEXT_TOKENS:
        raise ValueError(f"{parts[TEXT_MEMBER].name} has {len(tensor)} tokens")
    condition: dict[str, torch.Tensor] = {}
    if CONDITION_MEMBER in parts:
        condition = unpack(_bytes_of(stream, parts[CONDITION_MEMBER]), CONDITION_MEMBER)
    images = {name: value.get(name) for name in ("image", "last_image")}
    for name, image in images.items():
        if not isinstance(image, str | None):
            raise ValueError(f"{info.name} has {name} {image!r:.40}")
    bucket = _bucket(value, info)
    if (bucket is None) == (value["role"] == VALIDATION):
        raise ValueError(f"{info.name} has role {value['role']!r:.40} and bucket {bucket}")
    return Prompt(
        value["role"],
        value["prompt"],
        tensor,
        bucket=bucket,
        image=images["image"],
        last_image=images["last_image"],
        **condition,
    )


def _bucket(value: dict[str, Any], info: Member) -> Bucket | None:
    sides = [value[side] for side in SIDES if side in value]
    if not sides:
        return None
    if not is_bucket(value):
        raise ValueError(f"{info.name} has {', '.join(SIDES)} of {sides!r:.80}")
    return bucket_of(value)
