"""Sees every operator of an update: what a GPU would wait for, what is fp32, FLOPs and bytes."""

import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.plan_peaks import LiveBytes

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
_OURS = tuple(str(ROOT / package) + "/" for package in ("train", "shared"))
_THEIRS = (
    "/diffusers/", "/peft/", "/torch/optim/", "/torch/nn/utils/",
    "/torch/nn/modules/normalization.py", "/bitsandbytes/",
)  # fmt: skip
# Their results' shapes depend on values, for which the CPU waits.
_SHAPED_BY_VALUES = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.bincount, aten.histc, aten._local_scalar_dense, aten.equal, aten.is_nonzero,
}  # fmt: skip


@cache
def _stem(code: CodeType) -> str | None:
    """Name of its file, if that is one of this repository or of a model's library."""
    name = code.co_filename
    known = name.startswith(_OURS) or any(part in name for part in _THEIRS)
    return Path(name).stem if known else None


def _site(frame: FrameType | None) -> str:
    """ "file:Class.function" of the innermost known frame."""
    while frame is not None:
        if (stem := _stem(frame.f_code)) is not None:
            owner = frame.f_locals.get("self")
            kind = f"{type(owner).__name__}." if owner is not None else ""
            return f"{stem}:{kind}{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Watch(LiveBytes):
    """Counts while it is entered, inside of `fake_gpu`."""

    def __init__(self, activation: int) -> None:
        super().__init__()
        self.activation = activation
        """Elements of a tensor as large as the hidden states."""
        self.waits: Counter[str] = Counter()
        """What the CPU waits for: "kind at site" → times."""
        self.moved: Counter[str] = Counter()
        """Copies that it doesn't wait for: "to the CPU", "to the device" → times."""
        self.wide: Counter[str] = Counter()
        """Tensors of fp32 as large as half of the hidden states: "operator at site" → times."""
        self.flops = self.written = 0
        """Of blocks, forward, again and backward; bytes of new tensors on the device."""
        self._blocks = 0
        self._made: dict[int, tuple[str, bool]] = {}
        """Number of an autograd node → where its forward ran, and whether in a block."""

    def see_blocks(self, blocks: nn.ModuleList) -> None:
        for block in blocks:
            block.register_forward_pre_hook(self._enter, prepend=True)
            block.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self._blocks += 1

    def _leave(self, *_: Any) -> None:
        self._blocks -= 1

    def see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda":
            super().see(tensor)

    def _place(self) -> tuple[str, bool]:
        """Where this operator comes from, and whether it belongs to a block."""
        if torch._C._current_graph_task_id() == -1:
            place = _site(sys._getframe(2)), self._blocks > 0
            self._made.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
            return place
        if self._blocks:  # computed again
            return _site(sys._getframe(2)), True
        node = torch._C._current_autograd_node()
        site, inside = self._made.get(node._sequence_nr(), ("elsewhere", False))
        return f"{site} (backward)", inside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        site, inside = self._place()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if on_gpu and (packet in _SHAPED_BY_VALUES or _masked(packet, args)):
            self.waits[f"{packet.__name__} at {site}"] += 1
        if packet is aten._local_scalar_dense:
            return _some_number(args[0])
        if packet is aten.equal:
            return False
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (crossing := _crossing(packet, args, kwargs, out)) is not None:
            where, waits = crossing
            if waits:
                self.waits[f"copy {where} at {site}"] += 1
            else:
                self.moved[where] += 1
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not func.is_view and not packet.__name__.endswith("_"):
            for tensor in made:
                if tensor.device.type != "cuda":
                    continue
                if inside:
                    self.written += tensor.nbytes
                large = tensor.numel() >= self.activation // 2
                if large and tensor.dtype in (torch.float32, torch.float64):
                    self.wide[f"{packet.__name__} at {site}"] += 1
        if inside and packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _masked(packet: Any, args: Any) -> bool:
    """Whether a mask of a tensor on the device selects: torch looks for its places."""
    if packet not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return False
    by_mask = any(one is not None and one.dtype == torch.bool for one in args[1])
    if packet is aten.index:
        return by_mask
    value = args[2]  # one number from the CPU is filled in, without looking
    return by_mask and not (value.numel() == 1 and value.device.type == "cpu")


def _crossing(
    packet: Any, args: Any, kwargs: Mapping[str, Any], out: Any
) -> tuple[str, bool] | None:
    """Where a copy between CPU and device goes, and whether the CPU waits for it."""
    if packet is aten._to_copy:
        source, target, free = args[0], out, kwargs.get("non_blocking", False)
    elif packet is aten.copy_:
        target, source = args[:2]
        free = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        return None
    if source.device.type == target.device.type:
        return None
    return "to the device" if target.device.type == "cuda" else "to the CPU", not free


def _some_number(tensor: torch.Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1
