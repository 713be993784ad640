"""`--where`: which samples of a cache a run trains on, by what is known of them.

    frames>=17    width>height    type=video    bucket=832x480x*    tag!=blurry    caption~=cat|dog

A condition is a field, an operator and a value. What stands in the index (`type`, `bucket`, the
numbers) is answered from it; `caption`, `source` and `tag` stand in the samples' KEY.json, which
are read shard by shard. What such a search has found is remembered on this machine.
"""

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache import CacheIndex, MemberReader
from shared.durable import write_bytes
from shared.errors import UserError
from shared.hashing import cache_folder, digest_of
from shared.schema import JSON_MEMBER, MEDIA_TYPES, MEMBERS, TEXT_MEMBER

Mask = npt.NDArray[np.bool_]

NUMBERS = ("height", "width", "frames", "tokens")
NAMES = ("type", "bucket")
TEXTS = ("caption", "source", "tag")
FIELDS = (*TEXTS, *NAMES, *NUMBERS)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_MATCH = ("=", "!=", "~=")
_CONDITION = re.compile(r"\s*(\w+)\s*([=!<>~]+)\s*(.*?)\s*", re.DOTALL)
_FORM = (
    "expected FIELD, an operator and a value, e.g. 'frames>=17', 'tag=good' or 'caption~=cat'; "
    f"fields are {', '.join(FIELDS)}"
)

_THREADS = 16
_BLOCK = 2048  # samples that a thread reads before it looks for the next ones
_EXAMPLES, _MOST_LISTED, _MOST_READ = 3, 12, 2000


@dataclass(frozen=True)
class Condition:
    """One checked `--where`."""

    field: str
    operator: str
    value: str
    """As it was given: a pattern, a regular expression, a number or the field of a number."""

    def __str__(self) -> str:
        return f"{self.field}{self.operator}{self.value}"

    def matcher(self) -> Callable[[Sequence[str]], bool]:
        """Of a field of text: whether its values (all tags, or one text) fulfil the condition."""
        if self.operator == "~=":
            search = re.compile(self.value).search
            return lambda texts: any(search(text) for text in texts)
        match = re.compile(translate(self.value)).match
        if self.operator == "=":
            return lambda texts: any(match(text) for text in texts)
        return lambda texts: not any(match(text) for text in texts)


def condition(text: str) -> Condition:
    """A condition from the command line. UserError for what is none, with what there is."""
    found = _CONDITION.fullmatch(text)
    if not found:
        raise UserError(f"--where: found {text!r}, {_FORM}.")
    field, comparison, value = found.groups()
    if field not in FIELDS:
        raise UserError(f"--where: {text!r} has the field {field!r}; {_FORM}.")
    allowed = tuple(_COMPARE) if field in NUMBERS else _MATCH
    if comparison not in allowed:
        raise UserError(
            f"--where: {text!r} has the operator {comparison!r}; for {field} there are "
            f"{' '.join(allowed)}"
            + (" (= and != take * and ?, ~= a regular expression)." if allowed is _MATCH else ".")
        )
    if field in NUMBERS and not (value in NUMBERS or re.fullmatch(r"\d{1,12}", value)):
        raise UserError(
            f"--where: {text!r} compares {field} with {value!r}, expected a whole number or one of "
            f"{', '.join(NUMBERS)}."
        )
    if comparison == "~=":
        try:
            re.compile(value)
        except re.error as error:
            raise UserError(
                f"--where: {text!r} has no regular expression after ~= ({error}); put a \\ before "
                "a sign that stands for itself."
            ) from error
    checked = Condition(field, comparison, value)
    if field == "type" and not any(map(checked.matcher(), ([kind] for kind in MEDIA_TYPES))):
        raise UserError(f"--where: {text!r} fits no type; types are {', '.join(MEDIA_TYPES)}.")
    return checked


def select(index: CacheIndex, conditions: Sequence[Condition]) -> Mask:
    """(N) which samples fulfil all conditions. Raises UserError on damaged samples."""
    chosen = np.ones(len(index), dtype=np.bool_)
    for one in conditions:
        if one.field not in TEXTS:
            chosen &= _from_index(index, one)
    of_text = [one for one in conditions if one.field in TEXTS]
    if not (of_text and chosen.any()):
        return chosen
    overlay = index.overlays.get(TEXT_MEMBER)
    what = [index.digest, overlay and overlay.index.digest, sorted(map(str, conditions))]
    memo = cache_folder() / "where" / digest_of(what)
    with suppress(OSError):
        data = memo.read_bytes()
        bits = np.frombuffer(data[32:], dtype=np.uint8)
        if data[:32] == hashlib.sha256(data[32:]).digest() and len(bits) == -(-len(index) // 8):
            return np.unpackbits(bits, count=len(index)).astype(np.bool_)
    _search(index, of_text, chosen)
    packed = np.packbits(chosen).tobytes()
    with suppress(OSError):  # it would have saved time
        write_bytes(memo, hashlib.sha256(packed).digest(), packed)
    return chosen


def nothing_selected(indexes: Sequence[CacheIndex], conditions: Sequence[Condition]) -> UserError:
    """What to say where no sample of any cache fulfils all conditions."""
    samples = sum(map(len, indexes))
    folders = ", ".join(str(index.folder) for index in indexes)
    lines = [f"--where: none of the {samples} samples in {folders} fulfils all of:"]
    for one in conditions:
        fit = sum(int(select(index, [one]).sum()) for index in indexes)
        lines.append(f"  {one}  (fits {fit}; {_there_is(indexes, one.field)})")
    if any(one.field in ("caption", "source") and one.operator == "=" for one in conditions):
        lines.append("With = the whole text must fit; * stands for any characters: caption=*cat*")
    return UserError("\n".join(lines))


def _from_index(index: CacheIndex, one: Condition) -> Mask:
    if one.field in NUMBERS:
        other: Any = _numbers(index, one.value) if one.value in NUMBERS else int(one.value)
        return np.asarray(_COMPARE[one.operator](_numbers(index, one.field), other))
    fits = one.matcher()
    if one.field == "type":
        return np.array([fits([name]) for name in MEDIA_TYPES])[index.types]
    return np.array([fits([str(bucket)]) for bucket in index.buckets], dtype=np.bool_)[
        index.bucket_ids
    ]


def _numbers(index: CacheIndex, field: str) -> npt.NDArray[np.int32]:
    """(N) values of a field of numbers."""
    if field == "tokens":
        return index.tokens
    of_buckets = np.array([getattr(bucket, field) for bucket in index.buckets], dtype=np.int32)
    return of_buckets[index.bucket_ids]


def _search(index: CacheIndex, conditions: Sequence[Condition], chosen: Mask) -> None:
    """Clear what of `chosen` does not fulfil conditions on text, in the order of the shards."""
    matchers = [(one.field, one.matcher()) for one in conditions]
    fields = {one.field for one in conditions}

    def search(rows: npt.NDArray[np.intp]) -> None:
        for row, texts in _texts(index, rows, fields):
            chosen[row] = all(fits(texts[field]) for field, fits in matchers)

    rows = np.flatnonzero(chosen)
    places = index.offsets[rows, MEMBERS.index(JSON_MEMBER)]
    rows = rows[np.lexsort((places, index.shard_ids[rows]))]
    blocks = np.array_split(rows, -(-len(rows) // _BLOCK))
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for _ in pool.map(search, blocks):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _texts(
    index: CacheIndex, rows: Iterable[int], fields: Iterable[str]
) -> Iterable[tuple[int, dict[str, list[str]]]]:
    """Row and, of each field of text, its values; the caption is the one that is trained on."""
    overlay = index.overlays.get(TEXT_MEMBER)
    own = MemberReader(index, open_files=2)
    other = None if overlay is None else MemberReader(overlay.index, open_files=2)
    elsewhere = other is not None and "caption" in fields
    needs_own = not elsewhere or set(fields) != {"caption"}
    try:
        for row in map(int, rows):
            texts: dict[str, list[str]] = {}
            at = -1 if overlay is None or not elsewhere else int(overlay.rows[row])
            if needs_own or at < 0:
                info = own.info(row)
                tags = info.get("tags", [])
                texts = {
                    "caption": [info["caption"]],
                    "source": [info["source"]],
                    "tag": [str(tag) for tag in tags] if isinstance(tags, list) else [],
                }
            if other is not None and at >= 0:
                texts["caption"] = [other.info(at)["caption"]]
            yield row, texts
    finally:
        own.close()
        if other is not None:
            other.close()


def _there_is(indexes: Sequence[CacheIndex], field: str) -> str:
    """Values of a field, in words, for somebody whose condition fits none."""
    if field in NUMBERS:
        values = [_numbers(index, field) for index in indexes if len(index)]
        return f"{field} is {min(v.min() for v in values)} … {max(v.max() for v in values)}"
    counts: Counter[str] = Counter()
    for index in indexes:
        if field in TEXTS:
            for _, texts in _texts(index, range(min(len(index), _MOST_READ)), [field]):
                counts.update(texts[field])
            continue
        names = MEDIA_TYPES if field == "type" else tuple(map(str, index.buckets))
        sums = np.bincount(index.types if field == "type" else index.bucket_ids)
        counts.update({name: int(n) for name, n in zip(names, sums, strict=False) if n})
    if field in ("caption", "source"):
        return "e.g. " + ", ".join(f"{text!r:.60}" for text in list(counts)[:_EXAMPLES])
    if not counts:
        return "no sample has a tag"
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_LISTED]
    listed = [f"{name} ({number})" for name, number in most]
    more = ", ..." if len(counts) > _MOST_LISTED else ""
    return f"there are {', '.join(listed)}{more}"
