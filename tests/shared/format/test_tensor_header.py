"""Headers of safetensors files: what the library wrote is read, what it never writes is refused."""

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from shared.format.schema import CONDITION_MEMBER, LATENTS_MEMBER, TEXT_MEMBER, pack, unpack
from shared.format.tensor_header import MOST_HEADER, TensorHeader, read_header


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**fields: Any) -> dict[str, Any]:
    """The header of a tensor `text` of 2 × 3 fp32, with some fields changed."""
    return {"text": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **fields}}


def test_what_safetensors_wrote_is_read() -> None:
    tensors = {
        "cond": torch.randn(2, 3, 4, 5).bfloat16(),
        "clip": torch.randn(257, 8),
    }
    data = safetensors.torch.save(tensors, {"made": "here"})
    header = 8 + int.from_bytes(data[:8], "little")
    assert dict(read_header(data, len(data))) == {
        "clip": TensorHeader("F32", (257, 8), header),  # the larger dtype goes first
        "cond": TensorHeader("BF16", (2, 3, 4, 5), header + 257 * 8 * 4),
    }
    found = unpack(data, CONDITION_MEMBER)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert read_header(data[:2000], len(data)) == read_header(data, len(data))


TWO = {
    "text": {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]},
    "more": {"dtype": "F32", "shape": [1, 3], "data_offsets": [12, 24]},
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (bytes(7), "7 bytes are no safetensors file"),
        (bytes(8), "its header is no JSON object"),
        (file_of(one(), bytes(24), length=1 << 40), "claims 1099511627776 bytes"),
        (file_of(one(), bytes(24), length=(1 << 64) - 1), "claims"),
        (file_of(b"{" + b" " * MOST_HEADER + b"}"), "expected at most 65536"),
        (file_of(b"[]"), "no JSON object"),
        (file_of(b"{"), "Expecting property name"),
        (file_of(b'{"a":' * 5000), "nested too deeply|Expecting"),
        (file_of(b'{"text":1,"text":2}'), "'text' occurs twice"),
        (file_of(b"\xff\xfe{}"), "no JSON object"),
        (file_of(b'{"a":"\xff"}'), "decode"),
        (file_of({"text": 3}), "lacks dtype, shape or data_offsets"),
        (file_of(one(more=1), bytes(24)), "or has more"),
        (file_of(one(dtype="F64"), bytes(24)), "dtype 'F64', expected BF16 or F32"),
        (file_of(one(dtype="BOOL"), bytes(24)), "dtype 'BOOL'"),
        (file_of(one(dtype=["F32"]), bytes(24)), "dtype"),
        (file_of(one(shape=[-2, -3]), bytes(24)), "has no shape"),
        (file_of(one(shape=[]), bytes(24)), "has no shape"),
        (file_of(one(shape=[0, 3]), bytes(24)), "has no shape"),
        (file_of(one(shape=[2.0, 3]), bytes(24)), "has no shape"),
        (file_of(one(shape=[True, 6]), bytes(24)), "has no shape"),
        (file_of(one(shape="23"), bytes(24)), "has no shape"),
        (file_of(one(shape=[6] + [1] * 8), bytes(24)), "has no shape"),
        (file_of(one(shape=[10**30]), bytes(24)), "has no shape"),
        (file_of(one(shape=[1 << 40, 1 << 40]), bytes(24)), "has 24 bytes, expected"),
        (file_of(one(shape=[2, 4]), bytes(24)), "has 24 bytes, expected 32"),
        (file_of(one(data_offsets=[24, 0]), bytes(24)), "has -24 bytes"),
        (file_of(one(data_offsets=[-24, 0]), bytes(24)), "has no data_offsets"),
        (file_of(one(data_offsets=[0]), bytes(24)), "has no data_offsets"),
        (file_of(one(data_offsets=None), bytes(24)), "has no data_offsets"),
        (file_of(one(data_offsets=[8, 32]), bytes(32)), "leave a gap at byte 0"),
        (file_of(one(), bytes(25)), "have 24 bytes, 25 are there"),
        (file_of(one(), bytes(23)), "have 24 bytes, 23 are there"),
        (file_of({**TWO, "more": TWO["text"]}, bytes(24)), "overlap"),
        (file_of({**one(), "__metadata__": [1]}, bytes(24)), "__metadata__"),
        (file_of({**one(), "__metadata__": {"a": 1}}, bytes(24)), "__metadata__"),
        (file_of({}), "holds \\[\\], expected 'text'"),
        (file_of(TWO, bytes(24)), "holds \\['more', 'text'\\], expected 'text'"),
        (file_of(one(shape=[6]), bytes(24)), "expected 2 dimensions"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_it_never_writes_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(data, TEXT_MEMBER)


def test_a_pickle_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "latents.safetensors"
    torch.save({"latents": torch.zeros(1, 1, 1, 1)}, path)
    with pytest.raises(ValueError, match="header claims"):
        unpack(path.read_bytes(), LATENTS_MEMBER)


def test_the_control() -> None:
    assert torch.equal(unpack(file_of(one(), bytes(24)), TEXT_MEMBER)["text"], torch.zeros(2, 3))
    assert unpack(pack(text=torch.ones(1, 1)), TEXT_MEMBER)["text"] == 1
