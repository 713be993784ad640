"""The columns of `index.zarr`: what they are, and reading one without trusting it.

Zarr arrays may name codecs and data types that decompress without end, allocate what a file never
had, or unpickle. Ours have one form, which is checked first; then the zarr library reads them.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from shared.format.schema import CONDITION_MEMBER, KEY_BYTES, MEMBERS
from shared.format.strict_json import is_count, parse

_PLACED = MEMBERS.index(CONDITION_MEMBER) + 1
"""The first members, whose places are in `offset` and `length`; those of later ones have a column
of their own, so that a reader who does not know them reads on."""

# column → (dtype, values per row). A row is one live sample; rows are sorted by key, so that what
# is trained on does not depend on how an encode was cut into shards.
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "key": ("uint8", (KEY_BYTES,)),
    "caption": ("uint8", (16,)),  # first 16 bytes of SHA-256 of the caption's UTF-8
    "bucket": ("int32", ()),
    "shard": ("int32", ()),
    "type": ("uint8", ()),  # position in MEDIA_TYPES
    "tokens": ("int32", ()),
    "repeats": ("int32", ()),  # how often an epoch shows the sample
    "offset": ("int64", (_PLACED,)),  # of each member's bytes in the tar, in MEMBERS' order
    "length": ("int64", (_PLACED,)),  # 0 where the sample has no such member
    "states": ("int64", (2,)),  # offset and length of that member
}
OPTIONAL = ("states",)
"""Columns that are left out where all of their values are 0, and read as that."""
Columns = dict[str, npt.NDArray[Any]]
"""Column name → values, as `COLUMNS` says."""

_METADATA = "zarr.json"
_MOST_METADATA = 1 << 20


def written(columns: Columns) -> Columns:
    """The columns that an index of these values has."""
    return {name: v for name, v in columns.items() if name not in OPTIONAL or v.any()}


def with_absent(columns: Columns, rows: int) -> Columns:
    """`columns` as written, with zeros for those that were left out. Raises KeyError for others."""
    for name in OPTIONAL:
        if name not in columns:
            dtype, per_row = COLUMNS[name]
            columns = {**columns, name: np.zeros((rows, *per_row), dtype)}
    return {name: columns[name] for name in COLUMNS}


def read_attributes(index: Path) -> dict[str, Any]:
    """Attributes of the group. Raises OSError or ValueError where it is not one of ours."""
    metadata = parse((index / _METADATA).read_bytes(), most=_MOST_METADATA)
    if not isinstance(metadata, dict) or metadata.get("node_type") != "group":
        raise ValueError("no zarr group")
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or not isinstance(attributes.get("sha256"), dict):
        raise ValueError("no attributes of an index")
    return attributes


def read_column(index: Path, name: str, rows: int) -> npt.NDArray[Any]:
    """A column of so many rows. Raises an exception of any kind where it is not one of ours.

    Nothing is allocated that is not there: its chunks are not compressed, so their files must have
    the size of what is in them.
    """
    folder = index / name
    dtype, per_row = COLUMNS[name]
    metadata = parse((folder / _METADATA).read_bytes(), most=_MOST_METADATA)
    if not isinstance(metadata, dict):
        raise ValueError("no zarr array")
    first = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]  # rows of a chunk
    if not is_count(first, least=1):
        raise ValueError(f"its chunk_grid is {metadata['chunk_grid']!r:.80}")
    shape = [first, *per_row]
    endian = {"configuration": {"endian": "little"}} if np.dtype(dtype).itemsize > 1 else {}
    expected: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": [rows, *per_row],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "codecs": [{"name": "bytes", **endian}],
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "storage_transformers": [],
    }
    for field, value in expected.items():
        if metadata.get(field) != value:
            raise ValueError(f"its {field} is {metadata.get(field)!r:.80}, expected {value!r}")
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    for number in range(-(-rows // shape[0])):
        file = folder.joinpath("c", str(number), *("0" for _ in per_row))
        if file.stat().st_size != size:
            raise ValueError(f"chunk {number} has {file.stat().st_size} bytes, expected {size}")
    return np.asarray(zarr.open_array(folder, mode="r", zarr_format=3)[:])


def column_digest(values: npt.NDArray[Any]) -> str:
    """SHA-256 (hex) of a column's values, row by row, little-endian."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(little)).hexdigest()


def caption_digest(caption: str) -> bytes:
    """What the index keeps of a caption: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(caption.encode()).digest()[: COLUMNS["caption"][1][0]]


def hex_keys(keys: npt.NDArray[np.uint8]) -> list[str]:
    """Keys (N, 16) as text, all at once: for a million a tenth of the time of one by one."""
    digits, width = keys.tobytes().hex(), 2 * KEY_BYTES
    return [digits[at : at + width] for at in range(0, len(digits), width)]
