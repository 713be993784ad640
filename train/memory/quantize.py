"""The linear layers of the frozen base's blocks in 8 or 4 bits for a weight.

Codes and scales are what is kept; a weight in the base's own dtype lives only inside a matmul, and
is computed anew in the backward pass. So autograd keeps no copy of it, with or without gradient
checkpointing (see docs/decisions.md for why this isn't torchao's linear layer).

- int8: a whole number in ±127 for each weight, and an fp32 scale for each row (output channel)
- fp8: e4m3 (largest value 448), and an fp32 scale for each row
- nf4: bitsandbytes' 4 bits, NormalFloat4 of QLoRA (arXiv:2305.14314), and an fp32 scale for every
  64 weights
"""

import math
from importlib.util import find_spec
from typing import Any, TypeGuard, get_args

import torch
from torch import nn
from torch.nn import functional as F

from shared.cli.left_out import ask_for
from shared.errors import UserError
from shared.models.spec import blocks_of, family_of
from train.options import BasePrecision, QuantisedPrecision

_LARGEST = {"fp8": torch.finfo(torch.float8_e4m3fn).max, "int8": 127.0}
_STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_NF4_BLOCK = 64
_SCALE_BYTES = 4


def is_quantised(precision: BasePrecision | None) -> TypeGuard[QuantisedPrecision]:
    return precision in get_args(QuantisedPrecision)


def check_installed(precision: BasePrecision | None) -> None:
    """UserError where nf4 is asked for and bitsandbytes, whose it is, is not here."""
    if precision != "nf4":
        return
    ask_for("bitsandbytes")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "--base-precision: found nf4, which needs bitsandbytes. Install it: pip install "
            "'wandistill[quant]', or use int8 or fp8, which need nothing more."
        )


def quantised_bytes(rows: int, columns: int, precision: QuantisedPrecision) -> int:
    """Of a weight (rows, columns) and its scales."""
    weights = rows * columns
    if precision == "nf4":
        return -(-weights // 2) + -(-weights // _NF4_BLOCK) * _SCALE_BYTES
    return weights + rows * _SCALE_BYTES


def base_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Name → linear layer of the base inside a block: those which can be quantised, not LoRA's."""
    blocks = family_of(transformer).blocks
    return {
        name: module
        for name, module in blocks_of(transformer).named_modules(prefix=blocks)
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


@torch.no_grad()
def quantise(transformer: nn.Module, precision: BasePrecision | None, device: torch.device) -> None:
    """Put a `QuantisedLinear` in place of each linear layer of the base inside a block.

    Layer by layer, computed on `device`; what comes of it stays on the CPU, where the transformer
    lies. Call it after LoRAs were injected: peft chooses its own layers by those of the base.
    """
    if not is_quantised(precision):
        return
    for name, linear in base_linears(transformer).items():
        parent, _, child = name.rpartition(".")
        quantised = QuantisedLinear(linear, precision, device)
        setattr(transformer.get_submodule(parent), child, quantised)


class QuantisedLinear(nn.Module):
    """y = x·Wᵀ + b, where W is kept in few bits. Gradients flow only to x."""

    def __init__(
        self, linear: nn.Linear, precision: QuantisedPrecision, device: torch.device
    ) -> None:
        super().__init__()
        codes, scales = _encoded(linear.weight.detach().to(device), precision)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.precision = precision
        self.dtype = linear.weight.dtype
        """In which the layer computes."""
        self.codes = nn.Parameter(codes.to(linear.weight.device), requires_grad=False)
        """uint8, whatever the bits mean: all that moves or broadcasts tensors knows it."""
        self.scales = nn.Parameter(scales.to(linear.weight.device), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features) in the base's dtype, as autocast would have it."""
        y: torch.Tensor = _Linear.apply(
            x.to(self.dtype), self.codes.detach(), self.scales.detach(), self.bias,
            self.precision, self.out_features,
        )  # fmt: skip
        return y

    def weight(self) -> torch.Tensor:
        """(out_features, in_features), as it takes part in the matmul."""
        shape = (self.out_features, self.in_features)
        return _decoded(self.codes, self.scales, self.precision, shape, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.precision}"


class _Linear(torch.autograd.Function):
    """What it saves are the codes and scales themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        precision: QuantisedPrecision,
        rows: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.precision, ctx.shape = precision, (rows, x.shape[-1])
        return F.linear(x, _decoded(codes, scales, precision, ctx.shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        weight = _decoded(codes, scales, ctx.precision, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, None, None, None


def _encoded(
    weight: torch.Tensor, precision: QuantisedPrecision
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and scales (fp32)."""
    if precision == "nf4":
        codes, state = _bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4"
        )
        return codes, state.absmax
    scales = weight.float().abs().amax(dim=1, keepdim=True) / _LARGEST[precision]
    scales[scales == 0] = 1  # a row of zeros
    scaled = weight.float() / scales
    if precision == "int8":
        scaled.round_()
    return scaled.to(_STORED[precision]).view(torch.uint8), scales


def _decoded(
    codes: torch.Tensor,
    scales: torch.Tensor,
    precision: QuantisedPrecision,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    if precision == "nf4":
        bitsandbytes = _bitsandbytes()
        # As one row: on a CPU bitsandbytes takes the first scale again where a row begins. And with
        # two sides: one that is asked for gets two there, of which compilers aren't told.
        state = bitsandbytes.QuantState(
            absmax=scales, shape=(1, math.prod(shape)), dtype=dtype, blocksize=_NF4_BLOCK,
            quant_type="nf4",
        )  # fmt: skip
        weight: torch.Tensor = bitsandbytes.dequantize_4bit(codes, state).view(shape)
        return weight
    # Codes are exact in bf16, and torch multiplies in fp32: the weight is rounded once.
    return codes.view(_STORED[precision]).to(dtype).mul_(scales)


def _bitsandbytes() -> Any:
    """bitsandbytes' functions, imported on first use: it takes seconds."""
    ask_for("bitsandbytes")
    from bitsandbytes import functional

    return functional
