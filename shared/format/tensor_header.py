"""The head of a safetensors file, checked before any tensor is made of it.

The safetensors library does the reading; this says first whether what it would read is what a cache
holds, so that a hostile header costs neither memory nor a stranger's error message.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

from shared.format.strict_json import is_count, parse

LENGTH_BYTES = 8
"""The file begins with its header's length, little-endian; then the header, then the tensors."""
MOST_HEADER = 1 << 16
MOST_DIMENSIONS = 8
_HEAD_BYTES = 512
"""Read at first: more than the headers that we write."""
ITEM_BYTES = {"BF16": 2, "F32": 4}
"""The dtypes that tensors of a cache may have, as safetensors calls them."""


class TensorHeader(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Where its bytes begin in the file."""


def read_head(read: Callable[[int], bytes], total: int) -> bytes:
    """The beginning of a safetensors file of `total` bytes with all of its header, and little more.

    `read` gives so many of its first bytes. Raises ValueError where there can be no header.
    """
    head = read(min(total, _HEAD_BYTES))
    needed = _header_bytes(head, total)
    return head if needed <= len(head) else read(needed)


def read_header(head: bytes, total: int) -> Mapping[str, TensorHeader]:
    """The tensors of a safetensors file of `total` bytes, by name.

    `head` is its beginning, at least the length and the header (`LENGTH_BYTES + MOST_HEADER` is
    always enough). Raises ValueError where the header is not one of a cache's, or does not account
    for every byte.
    """
    end = _header_bytes(head, total)
    return _parsed(head[LENGTH_BYTES:end], total - end)


def _header_bytes(head: bytes, total: int) -> int:
    """Length field and header together, by the first of them. Raises ValueError."""
    if min(len(head), total) < LENGTH_BYTES:
        raise ValueError(f"{total} bytes are no safetensors file")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > min(MOST_HEADER, total - LENGTH_BYTES):
        raise ValueError(
            f"its header claims {length} bytes, expected at most "
            f"{min(MOST_HEADER, total - LENGTH_BYTES)}"
        )
    return LENGTH_BYTES + length


@lru_cache(maxsize=4096)  # samples of one bucket have the same header
def _parsed(header: bytes, data_bytes: int) -> Mapping[str, TensorHeader]:
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    value = parse(header, most=MOST_HEADER)
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no object of strings")
    spans: list[tuple[int, int]] = []
    data = LENGTH_BYTES + len(header)
    tensors = {name: _tensor(name, fields, data, spans) for name, fields in value.items()}
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(begin, end)}")
        end = stop
    if end != data_bytes:
        raise ValueError(f"its tensors have {end} bytes, {data_bytes} are there")
    return MappingProxyType(tensors)


def _tensor(name: str, fields: Any, data: int, spans: list[tuple[int, int]]) -> TensorHeader:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:40]!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        expected = " or ".join(ITEM_BYTES)
        raise ValueError(f"tensor {name[:40]!r} has dtype {dtype!r:.40}, expected {expected}")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= MOST_DIMENSIONS
        or not all(is_count(side, least=1, most=1 << 40) for side in shape)
    ):
        raise ValueError(f"tensor {name[:40]!r} has no shape: {shape!r:.60}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"tensor {name[:40]!r} has no data_offsets: {offsets!r:.60}")
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(
            f"tensor {name[:40]!r} of shape {tuple(shape)} and dtype {dtype} has "
            f"{end - begin} bytes, expected {prod(shape) * ITEM_BYTES[dtype]}"
        )
    spans.append((begin, end))
    return TensorHeader(dtype, tuple(shape), data + begin)
