"""safetensors files in a fixed order, so that equal content is equal bytes."""

import json
import struct
from collections.abc import Mapping

import safetensors.torch
import torch


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
