"""safetensors files in a fixed order, so that equal content is equal bytes."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch

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


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors calls it, e.g. "BF16"."""
    data = safetensors.torch.save({"one": torch.empty(0, dtype=dtype)})
    return str(json.loads(data[8:])["one"]["dtype"])


def write_stream(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    value: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors that `value` gives, one in memory at a time; fsynced.

    The library's own writer wants all tensors of a file at once. `tensors` have the dtype and shape
    that `value` must keep; their numbers are not looked at.
    """
    # As the library orders them: wide numbers first, so that every tensor begins aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in order:
        dtype, shape, end = tensors[name].dtype, tensors[name].shape, begin + tensors[name].nbytes
        header[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [begin, end]}
        begin = end
    file = DurableFile(path)
    try:
        file.write(header_bytes(header))
        for name in order:
            data = memoryview(value(name).contiguous().reshape(-1).view(torch.uint8).numpy())
            assert data.nbytes == tensors[name].nbytes, name
            file.write(data)
        file.close()
    except BaseException:
        file.discard()
        raise
    fsync_file(path)
