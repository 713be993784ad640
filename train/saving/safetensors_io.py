"""safetensors files in a fixed order, so that equal content is equal bytes.

The library keeps metadata in a hash map, whose order changes from process to process, and wants all
tensors of a file in memory at once.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

from shared.io.durable import DurableFile, fsync_file


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    value: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[bytes | memoryview]:
    """A safetensors file of CPU tensors, part by part: the header, then each tensor's bytes.

    With `value` the numbers are what that gives for each name, one in memory at a time; `tensors`
    then only have the dtype and shape that it must keep.
    """
    # As the library orders them: wide numbers first, so that every tensor begins aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for name in order:
        dtype, shape, end = tensors[name].dtype, tensors[name].shape, begin + tensors[name].nbytes
        header[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin 8-aligned
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        tensor = tensors[name] if value is None else value(name)
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert data.nbytes == tensors[name].nbytes, name
        yield data


@cache
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
    """Write a safetensors file of tensors that `value` gives (`safetensors_parts`); fsynced."""
    file = DurableFile(path)
    try:
        for part in safetensors_parts(tensors, metadata, value):
            file.write(part)
        file.close()
    except BaseException:
        file.discard()
        raise
    fsync_file(path)
