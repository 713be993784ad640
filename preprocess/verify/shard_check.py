"""One tar, read once: its digest, its samples, and what an index should say of them."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch

from preprocess.cache.shard_rows import Row
from preprocess.verify.sample_check import (
    Expected,
    Problem,
    check_condition,
    check_info,
    check_tensors,
)
from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, Sidecar
from shared.format.columns import caption_digest
from shared.format.schema import (
    CONDITION_MEMBER,
    JSON_MEMBER,
    LATENTS_MEMBER,
    MEMBERS,
    STATES_MEMBER,
    TEXT_MEMBER,
)
from shared.format.tar import Member, TarError, files
from shared.io.store import Store

_READ_BYTES = 1 << 22


class HashedStream:
    """A file read forwards, whatever is asked for: SHA-256 and number of the bytes so far."""

    def __init__(self, stream: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self._stream = stream
        self._on_bytes = on_bytes
        self._sha256 = hashlib.sha256()
        self.offset = 0

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end of the file."""
        data = self._stream.read(size)
        self._sha256.update(data)
        before = self.offset
        self.offset += len(data)
        if steps := self.offset // _READ_BYTES - before // _READ_BYTES:
            self._on_bytes(steps * _READ_BYTES)
        return data

    def seek(self, offset: int) -> None:
        """Read up to there, or to the end of the file."""
        assert offset >= self.offset, "each byte is read once"
        while left := offset - self.offset:
            if not self.read(min(left, _READ_BYTES)):
                break

    def hexdigest(self) -> str:
        """Of the whole file: reads what is left of it."""
        while self.read(_READ_BYTES):
            pass
        self._on_bytes(self.offset % _READ_BYTES)
        return self._sha256.hexdigest()


@dataclass
class ShardReport:
    """What one tar holds, and what is wrong with it."""

    problems: list[tuple[str | None, Problem]] = field(default_factory=list)
    """(key, or None for the tar as a whole; problem), in the order of the tar."""
    rows: dict[str, Row] = field(default_factory=dict)
    """By key."""
    damage: TarError | None = None
    """Why it was not read to its end."""
    last_key: str | None = None
    """Of the sample that was read when the damage came."""
    roles: set[str] = field(default_factory=set)
    """Of prompts, in the prompt bank."""
    sound: bool = True
    """Whether these are the bytes that the sidecar says."""


def _bytes_of(store: Store, tar: Path) -> BinaryIO:
    """Raises OSError, also where a store has other bytes than were put there."""
    try:
        return store.shard_file(tar).open("rb")
    except UserError as error:
        raise OSError(str(error)) from error


def check_shard(
    store: Store, sidecar: Sidecar, expected: Expected, on_bytes: Callable[[int], None]
) -> ShardReport:
    """Read a tar from start to end.

    Raises OSError where it cannot be read at all, UserError where it lies in an object store and is
    not what its sidecar says.
    """
    report = ShardReport()
    path = store.folder / sidecar.shard
    if not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} is no file")
    with _bytes_of(store, path) as raw:
        stream = HashedStream(raw, on_bytes)
        found = files(stream, os.fstat(raw.fileno()).st_size)  # type: ignore[arg-type]
        try:
            for key, parts in groupby(found, key=attrgetter("key")):
                for problem in _sample(key, parts, stream, expected, report):
                    report.problems.append((key, problem))
        except TarError as damage:
            report.damage = damage
            report.last_key = damage.key or report.last_key
        sha256 = stream.hexdigest()
    problems = []
    if stream.offset != sidecar.bytes:
        problems.append(("size", f"{stream.offset} bytes", f"{sidecar.bytes}"))
    if sha256 != sidecar.sha256:
        problems.append(("checksum", f"SHA-256 {sha256[:12]}…", f"{sidecar.sha256[:12]}…"))
    report.sound = not problems
    if report.damage is None and len(report.rows) != sidecar.count:
        problems.append(("count", f"{len(report.rows)} samples", f"{sidecar.count}"))
    report.problems[:0] = [
        (None, Problem(code, found, f"{expected}, as its sidecar says"))
        for code, found, expected in problems
    ]
    return report


@dataclass
class _Sample:
    """The sample whose members are being read."""

    row: Row = field(default_factory=Row)
    seen: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def _sample(
    key: str, parts: Iterable[Member], stream: HashedStream, expected: Expected, report: ShardReport
) -> Iterator[Problem]:
    """What is wrong with a sample; its row goes into the report."""
    sample = _Sample()
    for member in parts:
        suffix = member.suffix
        if suffix not in expected.allowed:
            yield Problem("member-unexpected", f"a .{suffix}", " ".join(expected.allowed))
            continue
        if not sample.seen:
            if key in report.rows:
                yield Problem("key-duplicate", "the sample a second time", "it once")
            report.rows[key] = sample.row
            report.last_key = key
        if suffix in sample.seen:
            yield Problem("member-duplicate", "the member a second time", "it once", suffix)
            continue
        if sample.seen and MEMBERS.index(suffix) < max(map(MEMBERS.index, sample.seen)):
            order = " ".join(expected.allowed)
            yield Problem("member-order", "the member too late", order, suffix)
        sample.seen.append(suffix)
        sample.row.place(member)
        wanted = expected.of_prompt(sample.info) if expected.bucket is None else expected
        for problem in _member(member, stream, sample, wanted, report):
            yield replace(problem, member=suffix)
    if sample.seen:
        yield from _whole(sample, expected)


def _member(
    member: Member, stream: HashedStream, sample: _Sample, expected: Expected, report: ShardReport
) -> list[Problem]:
    suffix, most = member.suffix, expected.most_bytes(member.suffix)
    if member.size > most:
        code = "json-damaged" if suffix == JSON_MEMBER else "tensor-damaged"
        return [Problem(code, f"{member.size} bytes", f"at most {most}")]
    data = member.read(stream, most)  # type: ignore[arg-type]
    if suffix == JSON_MEMBER:
        problems, sample.info = check_info(data, expected)
        if expected.bucket is not None:
            _fill(sample.row, sample.info)
        elif sample.info:
            report.roles.add(str(sample.info.get("role")))
        return problems
    problems, tensor = check_tensors(suffix, data, expected)
    if tensor is not None:
        sample.tensors[suffix] = tensor
        sample.row.tokens = len(tensor) if suffix == TEXT_MEMBER else sample.row.tokens
    return problems


def _fill(row: Row, info: dict[str, Any]) -> None:
    """What the index keeps of `KEY.json`, as far as it is there."""
    if isinstance(info.get("caption"), str):
        row.caption = caption_digest(info["caption"])
    if info.get("type") in MEDIA_TYPES:
        row.type = MEDIA_TYPES.index(info["type"])
    if isinstance(info.get("repeats", 1), int):
        row.repeats = info.get("repeats", 1)


def _whole(sample: _Sample, expected: Expected) -> Iterator[Problem]:
    text_only = sample.info.get("type") == "text"
    for suffix in expected.required:
        needless = text_only and suffix in (LATENTS_MEMBER, CONDITION_MEMBER, STATES_MEMBER)
        if suffix not in sample.seen and not needless:
            yield Problem("member-missing", "no such member", "it", suffix)
        if suffix in sample.seen and needless:
            only = f"{JSON_MEMBER} {TEXT_MEMBER}, as its type is text"
            yield Problem("member-unexpected", f"a .{suffix}", only)
    latents, cond = (sample.tensors.get(name) for name in (LATENTS_MEMBER, CONDITION_MEMBER))
    if not expected.synthesised:
        yield from check_condition(latents, cond)
