"""Metadata files as records: what a line says, not yet what it means.

JSON, JSON lines, CSV; and plain text with a caption a line, which stands for no media.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError, json_kind
from shared.format.captions import is_blank
from shared.io.names import quoted

NAMES = ("metadata.json", "metadata.jsonl", "metadata.csv")
"""What is looked for in a data folder."""
PATH_FIELDS = ("file_path", "video_path", "image_path", "file_name")
"""VideoX-Fun's; musubi-tuner's and others'; Hugging Face datasets'."""
CAPTION_FIELDS = ("text", "caption", "captions")
CAPTION_ONLY_FIELDS = (*CAPTION_FIELDS, "type", "width", "height", "frames", "tags")
"""An entry with no others, and no path, may be text-only."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the entries of a list must hold, and how messages speak of it."""

    subject: str
    """In front of a message."""
    entry: str
    lines: str
    """What a line of a .txt file is."""
    option: str
    """Names the option that gives the file."""
    columns: dict[str, tuple[str, ...]]
    """What → the names that a CSV column with it may have; one of each must be there."""
    text_only_columns: tuple[str, ...] = ()
    """A CSV file with no other columns than these needs no path."""


MEDIA = Form(
    subject="dataset",
    entry=f"a path ({' | '.join(PATH_FIELDS)}) and a caption ({' | '.join(CAPTION_FIELDS)})",
    lines="a caption a line and no media",
    option="--train-data-meta (or DATASET_META_NAME)",
    columns={"path": PATH_FIELDS, "caption": CAPTION_FIELDS},
    text_only_columns=CAPTION_ONLY_FIELDS,
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One entry of a metadata file."""

    where: str
    """For messages: "metadata.json[3]", "metadata.csv line 7"."""
    value: Any
    """The JSON value, or a CSV row as an object of its filled fields."""
    problem: str | None = None
    """Why the line can't be read; `value` is None then."""


def find_metadata(data_dir: Path) -> Path | None:
    """The metadata file of a folder, None without any; UserError where there are several."""
    found = [data_dir / name for name in NAMES if (data_dir / name).exists()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"dataset: {data_dir} holds {names}; expected one. Choose: --train-data-meta "
            f"{quoted(found[0])}"
        )
    return found[0] if found else None


def read_metadata(path: Path, form: Form = MEDIA) -> list[Record]:
    """All records of a .json, .jsonl, .csv or .txt file; of the last, a caption a line.

    UserError where the file as a whole is unusable; a bad line of a .jsonl or .csv file is returned
    as a Record with a problem.
    """
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".txt": _lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        found = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise UserError(
            f"{form.subject}: {path} {found}, expected .json, .jsonl or .csv with {form.entry} in "
            f"each entry, or .txt with {form.lines}. Set {form.option} to such a file."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")  # bytes: line ends inside captions are kept
    except OSError as error:
        left_out = ", or leave it out to use the .txt captions" if form is MEDIA else ""
        raise UserError(
            f"{form.subject}: cannot read {path} ({error.strerror}). Set {form.option} to a .json, "
            f".jsonl or .csv file with {form.entry} in each entry{left_out}."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{form.subject}: {path} is not UTF-8 text ({error}). Save it as UTF-8."
        ) from error
    records = reader(path, text, form)
    if not records:
        raise UserError(
            f"{form.subject}: {path} lists nothing. Expected at least one entry with {form.entry}. "
            f"Fill it, or set {form.option} to another file."
        )
    return records


def as_number(value: Any) -> Any:
    """A field's value, of digits in a CSV the number; 0 for more digits than any number has."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value) if len(value) < 10 else 0
    return value


def _lines(path: Path, text: str, form: Form) -> list[Record]:
    return [
        Record(where=where, value={"caption": line, "type": "text"})
        for where, line in _numbered(path, text)
    ]


def _numbered(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """(where, line) of lines that hold something.

    Not splitlines(): a caption may hold U+2028, which JSON does not escape.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not is_blank(line):
            yield f"{path.name} line {number}", line


def _json(path: Path, text: str, form: Form) -> list[Record]:
    expected = f"a JSON list of objects with {form.entry}"
    pairs: list[tuple[str, Any]] = []

    def kept(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object's come last; dict() would lose what is there twice
        return dict(found)

    try:
        value = json.loads(text, object_pairs_hook=kept)
    except (ValueError, RecursionError) as error:
        lines = _json_lines(path, text, form)[:2]
        cure = ""
        if len(lines) > 1 and all(line.problem is None for line in lines):
            cure = f" It looks like JSON lines: rename it to {path.with_suffix('.jsonl').name}."
        raise UserError(
            f"{form.subject}: {path} is not valid JSON ({error}). Expected {expected}.{cure}"
        ) from error
    if isinstance(value, dict) and form is MEDIA and _is_by_path(pairs):
        return [_by_path(path, name, said) for name, said in pairs]
    if not isinstance(value, list):
        cure = "Put it in [brackets]"
        if isinstance(value, dict) and "\n" not in text.strip():
            cure += (
                f", or rename the file to {path.with_suffix('.jsonl').name} if it has one a line"
            )
        raise UserError(
            f"{form.subject}: {path} holds {json_kind(value)}. Expected {expected}. {cure}."
        )
    return [Record(where=f"{path.name}[{n}]", value=item) for n, item in enumerate(value)]


def _is_by_path(pairs: list[tuple[str, Any]]) -> bool:
    """Whether an object is path → caption, as kohya's metadata: no entry, and no list in a box."""
    names = {name for name, _ in pairs}
    lists = (value for _, value in pairs if isinstance(value, list))
    in_a_box = any(not isinstance(item, str) for items in lists for item in items)
    return bool(pairs) and not names & {*PATH_FIELDS, *CAPTION_ONLY_FIELDS} and not in_a_box


def _by_path(path: Path, name: str, said: Any) -> Record:
    """`said`: the caption, several, or an object with it; that may have a path of its own, where
    `name` is but a number."""
    if not isinstance(said, dict):
        said = {"file_path": name, "caption": said}
    elif not any(field in said for field in PATH_FIELDS):
        said = {"file_path": name, **said}
    return Record(where=f"{path.name}[{json.dumps(name)}]", value=said)


def _json_lines(path: Path, text: str, form: Form) -> list[Record]:
    records = []
    for where, line in _numbered(path, text):
        try:
            records.append(Record(where=where, value=json.loads(line)))
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON ({error})"
            records.append(Record(where=where, value=None, problem=problem))
    return records


def _csv(path: Path, text: str, form: Form) -> list[Record]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Record] = []
    header: list[str] | None = None
    number = 1  # of the line at which a row begins
    try:
        for row in rows:
            where, number = f"{path.name} line {number}", rows.line_num + 1
            if all(map(is_blank, row)):
                continue
            if header is None:
                header = [field.strip() for field in row]
                _check_header(path, header, form)
            elif len(row) != len(header):
                problem = (
                    f"{len(row)} fields, expected {len(header)} as in the header; put captions "
                    'with commas in "double quotes"'
                )
                records.append(Record(where=where, value=None, problem=problem))
            else:
                fields = zip(header, row, strict=True)
                filled = {name: value for name, value in fields if not is_blank(value)}
                records.append(Record(where=where, value=filled))
    except csv.Error as error:
        raise UserError(
            f"{form.subject}: {path} line {number} is not valid CSV ({error}). Expected fields "
            'separated by commas, in "double quotes" where they hold commas, quotes or lines.'
        ) from error
    return records


def _check_header(path: Path, header: list[str], form: Form) -> None:
    wanted = dict(form.columns)
    if set(header) <= set(form.text_only_columns):
        del wanted["path"]
    for what, fields in wanted.items():
        if not set(fields) & set(header):
            cure = f"Rename the column that has the {what}s"
            if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                cure = "Save it with commas between the columns"
            raise UserError(
                f"{form.subject}: {path} has no {what} column: its first line names "
                f"{', '.join(header)}. Expected a header with {' or '.join(fields)}. {cure}."
            )
    if len(set(header)) < len(header):
        raise UserError(
            f"{form.subject}: {path}: a column occurs twice in {', '.join(header)}. Rename one."
        )
