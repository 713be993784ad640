"""`--where`: which samples of a cache a run trains on, by what is known of them.

    frames>=17    width>height    type=video    bucket=832x480x*    tag!=blurry    caption~=cat|dog

A condition is a field, an operator and a value. With `=` and `!=` the value is the text that some
sample has, else a pattern, in which `*` and `?` stand for others. What stands in the
index (`type`, `bucket`, the numbers) is answered from it; `caption`, `source` and `tag` stand in
the samples' KEY.json, which are read shard by shard. What such a search has found is remembered on
this machine.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader
from shared.format.schema import MEDIA_TYPES, TEXT_MEMBER
from shared.io.hashing import cache_folder, digest_of
from shared.io.memo import remembered
from shared.io.names import has_wildcard, matcher

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
_MEMO_FORMAT = 2  # 1: a mask of what fulfils all conditions, where brackets were special, too
_EXAMPLES, _MOST_LISTED, _MOST_READ = 3, 12, 2000


@dataclass(frozen=True)
class Condition:
    """One checked `--where`."""

    field: str
    operator: str
    value: str
    """As it was given: a text or pattern, a regular expression, a number or a number's field."""

    def __str__(self) -> str:
        return f"{self.field}{self.operator}{self.value}"

    def is_fit(self) -> Callable[[str], bool]:
        """Of a field of text: whether a value fits, be it wanted (`=`, `~=`) or not (`!=`)."""
        if self.operator == "~=":
            search = re.compile(self.value).search
            return lambda text: search(text) is not None
        return matcher(self.value)

    @property
    def may_be_pattern(self) -> bool:
        """Whether it depends on all samples what fits: a text that one of them has is no pattern"""
        return self.field in TEXTS and self.operator != "~=" and has_wildcard(self.value)


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
        how = (
            " (= and != take * and ?, ~= a regular expression); a value that begins with such a "
            f"sign has a space before it, as in '{field}= ~a'"
        )
        raise UserError(
            f"--where: {text!r} has the operator {comparison!r}; for {field} there are "
            f"{' '.join(allowed)}{how if allowed is _MATCH else ''}."
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
    if field == "type" and not _from_names(checked, MEDIA_TYPES).any():
        raise UserError(f"--where: {text!r} fits no type; types are {', '.join(MEDIA_TYPES)}.")
    return checked


def select(indexes: Sequence[CacheIndex], conditions: Sequence[Condition]) -> list[Mask]:
    """(N) of each cache, which samples fulfil all conditions. UserError on damaged samples."""
    of_text = [one for one in conditions if one.field in TEXTS]
    others = [one for one in conditions if one.field not in TEXTS]
    chosen = []
    for index in indexes:
        chosen.append(np.ones(len(index), dtype=np.bool_))
        for one in others:
            chosen[-1] &= _from_index(index, one)
    if not of_text:
        return chosen
    # A text that any sample of any cache has is no pattern, so then all of them are looked at.
    whole = any(one.may_be_pattern for one in of_text)
    found = []
    for index, mask in zip(indexes, chosen, strict=True):
        among = np.ones_like(mask) if whole else mask
        found.append(_remembered(index, of_text, others, among))
    for number, one in enumerate(of_text):
        is_text = any(bool(same[number].any()) for _, same in found)
        for mask, (fits, same) in zip(chosen, found, strict=True):
            of_value = same[number] if one.may_be_pattern and is_text else fits[number]
            mask &= ~of_value if one.operator == "!=" else of_value
    return chosen


def _remembered(
    index: CacheIndex, of_text: Sequence[Condition], others: Sequence[Condition], among: Mask
) -> tuple[Mask, Mask]:
    """`_search`, or what this machine remembers of it."""
    if not among.any():
        nothing = np.zeros((len(of_text), len(index)), dtype=np.bool_)
        return nothing, nothing
    overlay = index.overlays.get(TEXT_MEMBER)
    asked = [list(map(str, of_text)), sorted(map(str, others))]
    what = [_MEMO_FORMAT, index.digest, overlay and overlay.index.digest, asked]
    memo = cache_folder() / "where" / digest_of(what)
    shape = (2, len(of_text), len(index))
    number = prod(shape)

    def search() -> bytes:
        return np.packbits(np.stack(_search(index, of_text, among))).tobytes()

    bits = np.frombuffer(remembered(memo, -(-number // 8), search), dtype=np.uint8)
    fits, same = np.unpackbits(bits, count=number).astype(np.bool_).reshape(shape)
    return fits, same


def nothing_selected(indexes: Sequence[CacheIndex], conditions: Sequence[Condition]) -> UserError:
    """What to say where no sample of any cache fulfils all conditions."""
    samples = sum(map(len, indexes))
    folders = ", ".join(str(index.store) for index in indexes)
    lines = [f"--where: none of the {samples} samples in {folders} fulfils all of:"]
    for one in conditions:
        fit = sum(int(mask.sum()) for mask in select(indexes, [one]))
        lines.append(f"  {one}  (fits {fit}; {_there_is(indexes, one.field)})")
    if any(one.field in ("caption", "source") and one.operator == "=" for one in conditions):
        lines.append("With = the whole text must fit; * stands for any characters: caption=*cat*")
    return UserError("\n".join(lines))


def _from_index(index: CacheIndex, one: Condition) -> Mask:
    if one.field in NUMBERS:
        other: Any = _numbers(index, one.value) if one.value in NUMBERS else int(one.value)
        return np.asarray(_COMPARE[one.operator](_numbers(index, one.field), other))
    names, numbers = _names(index, one.field)
    return _from_names(one, names)[numbers]


def _names(index: CacheIndex, field: str) -> tuple[Sequence[str], npt.NDArray[Any]]:
    """The names that a field of names has, and (N) positions in them."""
    if field == "type":
        return MEDIA_TYPES, index.types
    return list(map(str, index.buckets)), index.bucket_ids


def _from_names(one: Condition, names: Sequence[str]) -> Mask:
    """(n) which of these fulfil a condition on a name."""
    fits = np.array(list(map(one.is_fit(), names)), dtype=np.bool_)
    return ~fits if one.operator == "!=" else fits


def _numbers(index: CacheIndex, field: str) -> npt.NDArray[np.int32]:
    """(N) values of a field of numbers."""
    if field == "tokens":
        return index.tokens
    of_buckets = np.array([getattr(bucket, field) for bucket in index.buckets], dtype=np.int32)
    return of_buckets[index.bucket_ids]


def _search(index: CacheIndex, conditions: Sequence[Condition], among: Mask) -> tuple[Mask, Mask]:
    """(n, N) twice, of conditions on text: of which samples a value fits, of which it is the value.

    Samples are read in the order of the shards; those not `among` are not, and nothing is theirs.
    """
    fitting = [one.is_fit() for one in conditions]
    fields = {one.field for one in conditions}
    fits = np.zeros((len(conditions), len(index)), dtype=np.bool_)
    same = np.zeros_like(fits)

    def search(rows: npt.NDArray[np.intp]) -> None:
        for row, texts in texts_of(index, rows, fields):
            for number, (one, is_fit) in enumerate(zip(conditions, fitting, strict=True)):
                fits[number, row] = any(map(is_fit, texts[one.field]))
                same[number, row] = one.value in texts[one.field]

    in_blocks(index, np.flatnonzero(among), search)
    return fits, same


def in_blocks(
    index: CacheIndex,
    rows: npt.NDArray[np.intp],
    work: Callable[[npt.NDArray[np.intp]], None],
) -> None:
    """Do `work` on blocks of rows, in threads, in the order of the shards."""
    on_disk = index.as_on_disk(rows)
    blocks = np.array_split(on_disk, max(1, -(-len(on_disk) // _BLOCK)))
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for _ in pool.map(work, blocks):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def texts_of(
    index: CacheIndex, rows: Iterable[int], fields: Iterable[str]
) -> Iterable[tuple[int, dict[str, list[str]]]]:
    """Row and, of each field of text, its values; the caption is the one that is trained on."""
    overlay = index.overlays.get(TEXT_MEMBER) if "caption" in fields else None
    with closing(MemberReader(index, open_files=2)) as own, ExitStack() as opened:
        if overlay is not None:
            theirs = opened.enter_context(closing(MemberReader(overlay.index, open_files=2)))
        for row in map(int, rows):
            texts: dict[str, list[str]] = {}
            at = -1 if overlay is None else int(overlay.rows[row])
            if at < 0 or set(fields) != {"caption"}:
                info = own.info(row)
                tags = info.get("tags", [])
                texts = {name: [info[name]] for name in ("caption", "source")}
                texts["tag"] = list(map(str, tags)) if isinstance(tags, list) else []
            if at >= 0:
                texts["caption"] = [theirs.info(at)["caption"]]
            yield row, texts


def _there_is(indexes: Sequence[CacheIndex], field: str) -> str:
    """Values of a field, in words, for somebody whose condition fits none."""
    if field in NUMBERS:
        values = [_numbers(index, field) for index in indexes if len(index)]
        return f"{field} is {min(v.min() for v in values)} … {max(v.max() for v in values)}"
    counts: Counter[str] = Counter()
    for index in indexes:
        if field in TEXTS:
            for _, texts in texts_of(index, range(min(len(index), _MOST_READ)), [field]):
                counts.update(texts[field])
        else:
            names, numbers = _names(index, field)
            counts.update(names[number] for number in numbers.tolist())
    if field in ("caption", "source"):
        return "e.g. " + ", ".join(f"{text!r:.60}" for text in list(counts)[:_EXAMPLES])
    if not counts:
        return "no sample has a tag"
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_LISTED]
    listed = [f"{name} ({number})" for name, number in most]
    more = ", ..." if len(counts) > _MOST_LISTED else ""
    return f"there are {', '.join(listed)}{more}"
