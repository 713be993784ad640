"""One tar, read once: its digest, its samples, and what an index should say of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from preprocess.cache.index import caption_digest
from preprocess.verify.sample_check import (
    Expected,
    Problem,
    check_condition,
    check_info,
    check_tensors,
)
from preprocess.verify.tar_stream import HashedStream, Member, TarDamage, members
from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, Sidecar
from shared.format.schema import CONDITION_MEMBER, JSON_MEMBER, LATENTS_MEMBER, MEMBERS, TEXT_MEMBER
from shared.io.mirror import shard_file


@dataclass
class Row:
    """What the index should say of a sample: `shared.format.cache.COLUMNS`."""

    caption: bytes = b""
    type: int = 0
    tokens: int = 0
    repeats: int = 1
    offset: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))
    length: list[int] = field(default_factory=lambda: [0] * len(MEMBERS))


@dataclass
class ShardReport:
    """What one tar holds, and what is wrong with it."""

    problems: list[tuple[str | None, Problem]] = field(default_factory=list)
    """(key, or None for the tar as a whole; problem), in the order of the tar."""
    rows: dict[str, Row] = field(default_factory=dict)
    """By key."""
    damage: TarDamage | None = None
    """Why it was not read to its end."""
    last_key: str | None = None
    """Of the sample that was read when the damage came."""
    roles: set[str] = field(default_factory=set)
    """Of prompts, in the prompt bank."""
    sound: bool = True
    """Whether these are the bytes that the sidecar says."""


def _bytes_of(tar: Path) -> BinaryIO:
    """Raises OSError, also where a store has other bytes than were put there."""
    try:
        return shard_file(tar).open("rb")
    except UserError as error:
        raise OSError(str(error)) from error


def check_shard(
    path: Path, sidecar: Sidecar, expected: Expected, on_bytes: Callable[[int], None]
) -> ShardReport:
    """Read a tar from start to end.

    Raises OSError where it cannot be read at all, UserError where it lies in an object store and is
    not what its sidecar says.
    """
    report = ShardReport()
    if not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} is no file")
    with _bytes_of(path) as raw:
        stream = HashedStream(raw, on_bytes)
        try:
            for key, problem in _samples(members(stream), expected, report):
                report.problems.append((key, problem))
        except TarDamage as damage:
            report.damage = damage
        sha256 = stream.hexdigest()
    whole = []
    if stream.offset != sidecar.bytes:
        whole.append(
            Problem("size", f"{stream.offset} bytes", f"{sidecar.bytes}, as its sidecar says")
        )
    if sha256 != sidecar.sha256:
        whole.append(
            Problem(
                "checksum",
                f"SHA-256 {sha256[:12]}…",
                f"{sidecar.sha256[:12]}…, as its sidecar says",
            )
        )
    report.sound = not whole
    if report.damage is None and len(report.rows) != sidecar.count:
        whole.append(
            Problem("count", f"{len(report.rows)} samples", f"{sidecar.count}, as its sidecar says")
        )
    report.problems[:0] = [(None, problem) for problem in whole]
    return report


class _Sample:
    """The sample whose members are being read."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.row = Row()
        self.seen: set[str] = set()
        self.info: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}


def _samples(
    found: Iterator[Member], expected: Expected, report: ShardReport
) -> Iterator[tuple[str | None, Problem]]:
    """(key, problem); fills the report's rows on the way."""
    sample: _Sample | None = None
    for member in found:
        key, suffix = member.key, member.suffix
        if suffix not in expected.allowed:
            yield key, Problem("member-unexpected", f"a .{suffix}", " ".join(expected.allowed))
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield from _finish(sample, expected)
            if key in report.rows:
                yield key, Problem("key-duplicate", "the sample a second time", "it once")
            sample = _Sample(key)
            report.rows[key] = sample.row
            report.last_key = key
        if suffix in sample.seen:
            yield key, Problem("member-duplicate", "the member a second time", "it once", suffix)
            continue
        if sample.seen and MEMBERS.index(suffix) < max(map(MEMBERS.index, sample.seen)):
            order = " ".join(expected.allowed)
            yield key, Problem("member-order", "the member too late", order, suffix)
        sample.seen.add(suffix)
        column = MEMBERS.index(suffix)
        sample.row.offset[column], sample.row.length[column] = member.offset, member.size
        wanted = expected.of_prompt(sample.info) if expected.bucket is None else expected
        for problem in _member(member, suffix, sample, wanted, report):
            yield key, Problem(problem.code, problem.found, problem.expected, suffix)
    if sample is not None:
        yield from _finish(sample, expected)


def _member(
    member: Member, suffix: str, sample: _Sample, expected: Expected, report: ShardReport
) -> Iterator[Problem]:
    most = expected.most_bytes(suffix)
    if member.size > most:
        code = "json-damaged" if suffix == JSON_MEMBER else "tensor-damaged"
        yield Problem(code, f"{member.size} bytes", f"at most {most}")
        return
    data = member.read()
    if suffix != JSON_MEMBER:
        for item in check_tensors(suffix, data, expected):
            if isinstance(item, Problem):
                yield item
            elif suffix == TEXT_MEMBER:
                sample.row.tokens = len(item)
            else:
                sample.tensors[suffix] = item
        return
    for found in check_info(data, expected):
        if isinstance(found, Problem):
            yield found
            continue
        sample.info = found
        if expected.bucket is None:
            report.roles.add(str(found.get("role")))
        else:
            _fill(sample.row, found)


def _fill(row: Row, info: dict[str, Any]) -> None:
    """What the index keeps of `KEY.json`, as far as it is there."""
    if isinstance(info.get("caption"), str):
        row.caption = caption_digest(info["caption"])
    if info.get("type") in MEDIA_TYPES:
        row.type = MEDIA_TYPES.index(info["type"])
    if isinstance(info.get("repeats", 1), int):
        row.repeats = info.get("repeats", 1)


def _finish(sample: _Sample, expected: Expected) -> Iterator[tuple[str, Problem]]:
    alone = sample.info.get("type") == "text"  # a caption without a medium
    for suffix in expected.required:
        needless = alone and suffix in (LATENTS_MEMBER, CONDITION_MEMBER)
        if suffix not in sample.seen and not needless:
            yield sample.key, Problem("member-missing", "no such member", "it", suffix)
        if suffix in sample.seen and needless:
            only = f"{JSON_MEMBER} {TEXT_MEMBER}, as its type is text"
            yield sample.key, Problem("member-unexpected", f"a .{suffix}", only)
    latents, cond = (sample.tensors.get(name) for name in (LATENTS_MEMBER, CONDITION_MEMBER))
    for problem in check_condition(latents, cond):
        yield sample.key, problem
