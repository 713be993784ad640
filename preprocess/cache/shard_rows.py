"""A shard's rows of the index: found in its tar, and kept as an object beside it in a store.

There reading a tar is a download. That object is written before the sidecar, from the tar, and
never needed, since the tar says the same.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.errors import UserError
from shared.format.buckets import bucket_of
from shared.format.cache import Sidecar
from shared.format.columns import (
    COLUMNS,
    Columns,
    caption_digest,
    column_digest,
    with_absent,
    written,
)
from shared.format.overlays import made_by, required_members
from shared.format.schema import (
    JSON_MEMBER,
    LATENTS_MEMBER,
    MEDIA_TYPES,
    MEMBERS,
    MOST_INFO_BYTES,
    MOST_REPEATS,
    TEXT_MEMBER,
    tensors_in,
    unpack_info,
)
from shared.format.tar import Member, members
from shared.format.tensor_header import read_head
from shared.io.mirror import ROWS_SUFFIX
from shared.io.store import Store
from shared.models.spec import MAX_TEXT_TOKENS


@dataclass(slots=True)
class Row:
    """What the index says of one sample: `shared.format.columns.COLUMNS` but key and places."""

    caption: bytes = b""
    type: int = 0
    tokens: int = 0
    repeats: int = 1
    offset: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))
    length: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))

    def place(self, member: Member) -> None:
        """Where a member of the sample lies."""
        column = MEMBERS.index(member.suffix)
        self.offset[column], self.length[column] = member.offset, member.size

    def has(self, suffix: str) -> bool:
        return self.offset[MEMBERS.index(suffix)] > 0


def columns_of(rows: Mapping[str, Row]) -> Columns:
    """Rows by key as columns; `shard` and `bucket` are 0."""
    each = rows.values()
    values: dict[str, Any] = {
        "key": np.frombuffer(bytes.fromhex("".join(rows)), np.uint8),
        "caption": np.frombuffer(b"".join(row.caption for row in each), np.uint8),
        "bucket": np.zeros(len(rows)),
        "shard": np.zeros(len(rows)),
    }
    for name in ("type", "tokens", "repeats"):
        values[name] = [getattr(row, name) for row in each]
    for name in ("offset", "length"):
        values[name] = [getattr(row, name)[:-1] for row in each]
    values["states"] = [(row.offset[-1], row.length[-1]) for row in each]
    return {
        name: np.array(values[name], dtype).reshape(-1, *per_row)
        for name, (dtype, per_row) in COLUMNS.items()
    }


def scan_shard(store: Store, sidecar: Sidecar) -> Columns:
    """The rows of one tar, from its headers, its JSON and the heads of its tensors.

    `shard` and `bucket` are 0. Raises UserError where it holds anything that no cache's tar does.
    """
    path = store.folder / sidecar.shard
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with store.shard_file(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != sidecar.bytes:
                raise ValueError(f"it has {size} bytes, its sidecar says {sidecar.bytes}")
            samples = groupby(members(stream, size, MEMBERS), key=attrgetter("key"))
            rows = {key: _scanned(key, parts, stream, sidecar) for key, parts in samples}
        if len(rows) != sidecar.count:
            raise ValueError(f"it holds {len(rows)} samples, its sidecar says {sidecar.count}")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"shards: {path} is damaged ({error}). Restore it, or delete it together with "
            f"{Sidecar.path_for(path).name} and run `{made_by(sidecar.fingerprint)}` again: it "
            "encodes only what is missing."
        ) from error
    return columns_of(rows)


def _scanned(key: str, parts: Iterable[Member], stream: BinaryIO, sidecar: Sidecar) -> Row:
    """The row of a sample with these members. Raises ValueError where it is none of ours."""
    row = Row()
    for member in parts:
        row.place(member)
        try:
            if member.suffix == JSON_MEMBER:
                info = unpack_info(member.read(stream, MOST_INFO_BYTES + 1))
                if (bucket := bucket_of(info)) != sidecar.bucket:
                    raise ValueError(f"a sample of {bucket} in a shard of {sidecar.bucket}")
                row.caption = caption_digest(info["caption"])
                row.type = MEDIA_TYPES.index(info["type"])
                row.repeats = info.get("repeats", 1)  # older shards have none
                continue
            head = read_head(partial(member.read, stream), member.size)
            tensors = tensors_in(head, member.size, member.suffix)
            if member.suffix == TEXT_MEMBER:
                row.tokens = tensors["text"].shape[0]
                if row.tokens > MAX_TEXT_TOKENS:
                    raise ValueError(f"{row.tokens} tokens, expected at most {MAX_TEXT_TOKENS}")
        except ValueError as error:
            raise ValueError(f"{member.name}: {error}") from error
    alone = MEDIA_TYPES[row.type] == "text"
    if alone and row.has(LATENTS_MEMBER):
        raise ValueError(f"sample {key} is a caption alone, but has latents")
    for name in required_members(sidecar.fingerprint):
        if not row.has(name) and not (alone and name == LATENTS_MEMBER):
            raise ValueError(f"sample {key} has no {name}")
    return row


def pack_rows(columns: Columns, sha256: str) -> bytes:
    """safetensors of one shard's columns; `sha256` is the tar's."""
    arrays = {name: np.ascontiguousarray(values) for name, values in written(columns).items()}
    return save(arrays, metadata={"shard": sha256, "rows": _digest(arrays)})


def stored_rows(folder: Path, sidecar: Sidecar) -> Columns | None:
    """The columns of a shard; None where there are none, or not of this tar, or damaged ones."""
    path = (folder / sidecar.shard).with_suffix(ROWS_SUFFIX)
    try:
        with safe_open(path, framework="numpy") as stored:
            said = stored.metadata() or {}
            names = [name for name in COLUMNS if name in stored.keys()]  # noqa: SIM118
            columns = {name: stored.get_tensor(name) for name in names}
        whole = said.get("shard") == sidecar.sha256 and said.get("rows") == _digest(columns)
        columns = with_absent(columns, sidecar.count)
    except (OSError, SafetensorError, KeyError):
        return None
    return columns if whole and _fits(columns, sidecar) else None


def _fits(columns: Columns, sidecar: Sidecar) -> bool:
    """Whether they can be the rows of this shard: a store may hold what anybody put there."""
    for name, (dtype, per_row) in COLUMNS.items():
        if columns[name].dtype != dtype or columns[name].shape != (sidecar.count, *per_row):
            return False
    last = len(MEDIA_TYPES) - 1
    ranges = {"type": (0, last), "tokens": (0, MAX_TEXT_TOKENS), "repeats": (1, MOST_REPEATS)}
    for name, (least, most) in ranges.items():
        if ((columns[name] < least) | (columns[name] > most)).any():
            return False
    offsets = np.concatenate([columns["offset"], columns["states"][:, :1]], axis=1)
    lengths = np.concatenate([columns["length"], columns["states"][:, 1:]], axis=1)
    sizes_fit = (offsets >= 0) & (lengths >= 0) & (lengths <= sidecar.bytes - offsets)
    return bool(sizes_fit.all())


def _digest(columns: Columns) -> str:
    return "-".join(column_digest(columns[name])[:8] for name in columns)
