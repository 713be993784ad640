"""safetensors files in a fixed order, so that equal content is equal bytes."""

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from shared.errors import first_line
from shared.io.durable import DurableFile, fsync_file


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, memoryview]:
    """A safetensors file as (header, tensors), in a fixed order: equal content, equal bytes.

    The library keeps metadata in a hash map, whose order changes from process to process.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, dict(metadata) if metadata else None)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items()))} | {
            name: value for name, value in header.items() if name != "__metadata__"
        }
    return header_bytes(header), memoryview(data)[8 + length :]


def header_bytes(header: Mapping[str, object]) -> bytes:
    """A file's beginning: the header's length, the header, spaces that keep tensors 8-aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Stored(NamedTuple):
    """One tensor in a file on disk."""

    file: Path
    dtype: str
    """As safetensors calls it, e.g. "BF16"."""
    shape: tuple[int, ...]
    size: int
    """In bytes."""


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Name → tensor of a safetensors file, by its header. OSError or ValueError if it has none."""
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            return {
                name: Stored(file, told["dtype"], tuple(told["shape"]), end - begin)
                for name, told in header.items()
                for begin, end in [told["data_offsets"]]
            }
        except (
            struct.error,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            MemoryError,
        ) as error:
            raise ValueError(first_line(error)) from error


def write_stream(
    path: Path,
    tensors: Mapping[str, Stored],
    value: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors that `value` gives, one in memory at a time; fsynced.

    The library's own writer wants all tensors of a file at once. `tensors` say dtype and shape,
    which `value` must keep.
    """
    # As the library orders them: wide numbers first, so that every tensor begins aligned.
    order = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in order:
        _, dtype, shape, size = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    file = DurableFile(path)
    try:
        file.write(header_bytes(header))
        for name in order:
            data = memoryview(value(name).contiguous().reshape(-1).view(torch.uint8).numpy())
            assert data.nbytes == tensors[name].size, name
            file.write(data)
        file.close()
    except BaseException:
        file.discard()
        raise
    fsync_file(path)


def _width(stored: Stored) -> int:
    return stored.size // max(1, prod(stored.shape))
