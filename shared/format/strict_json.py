"""JSON from files of any origin: bounded, and nothing that JSON does not have."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import UserError, json_kind

Fits = type | Callable[[Any], bool]
"""What a parsed value should be: of a type, or so that this says yes."""
Fields = Mapping[str, Fits]
"""What an object must have: the form of a file as a table."""

# Deeper than anything that a cache holds, and far from what recursive code can bear.
MOST_LEVELS = 16


def parse(data: bytes, *, most: int) -> Any:
    """The value of UTF-8 JSON of at most `most` bytes.

    Raises ValueError, also for NaN and Infinity, for a name that occurs twice in an object, and
    for what is nested too deeply for the parser.
    """
    if len(data) > most:
        raise ValueError(f"{len(data)} bytes of JSON, expected at most {most}")
    try:
        return _DECODER.decode(data.decode())
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def read_object(path: Path, what: str, *, most: int, cure: str) -> dict[str, Any]:
    """A JSON object from a file. UserError names `what` and the file and ends with `cure`."""
    try:
        with path.open("rb") as stream:
            value = parse(stream.read(most + 1), most=most)
    except OSError as error:
        raise UserError(
            f"{what}: cannot read {path} ({error.strerror or error}). {cure}"
        ) from error
    except ValueError as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}). {cure}") from error
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} holds {json_kind(value)}, expected an object. {cure}")
    return value


def require(value: Mapping[str, Any], fields: Fields, optional: Collection[str] = ()) -> None:
    """Raise ValueError for the first of `misfits`."""
    for wrong in misfits(value, fields, optional).values():
        raise ValueError(wrong)


def misfits(
    value: Mapping[str, Any], fields: Fields, optional: Collection[str] = ()
) -> dict[str, str]:
    """Those of `fields` that are missing or do not fit, each with what is found.

    Those in `optional` may be missing. An object may have more than these.
    """
    return {
        name: f"{name} is {value[name]!r:.60}" if name in value else f"{name} is missing"
        for name, fits in fields.items()
        if not (is_fit(value[name], fits) if name in value else name in optional)
    }


def is_fit(value: object, fits: Fits) -> bool:
    """Whether a parsed value is what it should be."""
    return isinstance(value, fits) if isinstance(fits, type) else fits(value)


def is_list(value: object, fits: Fits) -> bool:
    """Whether a parsed value is a list of such values."""
    return isinstance(value, list) and all(is_fit(one, fits) for one in value)


def is_count(value: object, *, least: int = 0, most: int = 1 << 62) -> bool:
    """Whether a parsed value is a whole number in this range (true and false are none)."""
    return type(value) is int and least <= value <= most


def is_shallow(value: object) -> bool:
    """Whether a parsed value is nested no deeper than `MOST_LEVELS`; walks without recursion."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} occurs twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)
