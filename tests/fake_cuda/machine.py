"""What a CPU build of torch lacks of a GPU, as far as an update calls it, on fake tensors."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from train.memory.copy_stream import HostMemory, SideStream

CUDA = torch.device("cuda", 0)


class _Stream:
    """A stream, or an event: nothing is ever queued."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def wait_event(self, event: "_Stream") -> None:
        pass

    def record_event(self) -> "_Stream":
        return self


_DATA: Any = torch._C.TensorBase.data


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    _DATA.__set__(tensor, value)
    if isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device  # type: ignore[attr-defined]


def _apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`Module.to` as real tensors have it: parameters stay the same objects."""
    for child in module.children() if recurse else ():
        _apply(child, fn)
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.data = fn(parameter)
    for name, value in module.named_buffers(recurse=False):
        module._buffers[name] = fn(value)
    return module


class _Generator:
    """Of CUDA's random numbers, which torch has no kernels for here."""

    def __init__(self, device: torch.device) -> None:
        pass

    def manual_seed(self, seed: int) -> "_Generator":
        return self


_RAND = torch.rand


def _rand(*size: Any, generator: Any = None, **options: Any) -> torch.Tensor:
    return _RAND(*size, **options)


def _host_memory(_: SideStream, size: int) -> HostMemory:
    return HostMemory(torch.empty(size, dtype=torch.uint8))


@contextmanager
def fake_gpu() -> Iterator[Counter[str]]:
    """Inside, tensors are fake, those of numpy included, and `CUDA` is a device.

    Gives what attention got: "dtype of query, key, value" → times.
    """
    operands: Counter[str] = Counter()

    def flash(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """By the kernel that bf16 without a mask gets on a GPU; without CUDA's kernels torch would
        write out the matrix of all tokens by all."""
        three = [query, key, value]
        operands[", ".join(str(one.dtype).removeprefix("torch.") for one in three)] += 1
        if torch.is_autocast_enabled("cuda"):
            three = [one.to(torch.get_autocast_dtype("cuda")) for one in three]
        out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*three)[0]
        return out

    shells = (
        mock.patch.object(torch.cuda, "current_stream", _Stream),
        mock.patch.object(torch.cuda, "Stream", _Stream),
        mock.patch.object(torch.cuda, "stream", nullcontext),
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        mock.patch.object(torch.Tensor, "data", property(_DATA.__get__, _set_data)),
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(torch, "rand", _rand),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(SideStream, "host_memory", _host_memory),
    )
    with ExitStack() as held:
        for shell in shells:
            held.enter_context(shell)
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield operands
