"""Which code computes attention: those of diffusers' backends that can train."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.utils import logging
from torch.nn.attention import SDPBackend

from shared.errors import UserError, first_line
from train.options import Precision

NATIVE = "native"
"""torch's scaled_dot_product_attention, which chooses a kernel by itself."""
# SageAttention quantises and has no gradient; FlashAttention 3's own package is called by diffusers
# through an operator without one (its build on the Hub, `_flash_3_hub`, is not).
_INFERENCE_ONLY = ("sage", "_sage")
_WITHOUT_GRADIENT = ("_flash_3",)
# Whose backward pass follows `torch.use_deterministic_algorithms`: torch's own but for cuDNN's,
# which it then leaves out of its choice.
_DETERMINISTIC = (NATIVE, "_native_math", "_native_flash", "_native_efficient")
_HOPPER = (9, 0)
_SLOW, _SEE = "this attention kernel is slow", "see docs/speed.md, --attention-backend"
_FETCHED = "_hub"
"""In the names of kernels that diffusers downloads when they are first used."""


def check_name(name: str) -> None:
    """UserError unless it is a backend of diffusers, and one that is not only for inference."""
    names = [backend.value for backend in AttentionBackendName]
    trains = [one for one in names if _may_train(one)]
    if name not in names or not _may_train(name):
        why = (
            f"{name} is for inference only: it has no gradient"
            if name in names
            else f"unknown attention backend {name}"
        )
        raise UserError(
            f"--attention-backend: {why}. Expected one of {', '.join(trains)}; some need "
            "packages, a GPU or bf16, which is checked before weights are read."
        )


def check_deterministic(name: str) -> None:
    """UserError unless the gradients of a backend can be the same bits every time."""
    if name not in _DETERMINISTIC:
        raise UserError(
            f"--deterministic: found with --attention-backend {name}, whose backward pass adds up "
            f"in any order. Use one of {', '.join(_DETERMINISTIC)}, or leave out --deterministic."
        )


def _may_train(name: str) -> bool:
    return not name.startswith(_INFERENCE_ONLY) and name not in _WITHOUT_GRADIENT


def check_attention(name: str, device: str, precision: Precision) -> None:
    """UserError unless `name` works forward and backward here, in the precision of the run.

    Found out by a small attention, so no package, device or dtype need be known here.
    """
    check_name(name)
    if name == NATIVE or (why := _failure(name, device, precision)) is None:
        return
    raise UserError(
        f"--attention-backend: {name} can't train here, on {device} with --mixed-precision "
        f"{precision} ({why}). These can: {', '.join(trainable(device, precision))}."
    )


def trainable(device: str, precision: Precision) -> list[str]:
    """Backends that work here forward and backward, without those that must first be fetched."""
    return [
        backend.value
        for backend in AttentionBackendName
        if _may_train(backend.value)
        and _FETCHED not in backend.value
        and _failure(backend.value, device, precision) is None
    ]


def _failure(name: str, device: str, precision: Precision) -> str | None:
    """Why a backend can't train; None if it can."""
    try:
        out = small_attention(name, device, precision)
        if not out.requires_grad:
            return "it has no gradient"
        out.sum().backward()
    except Exception as error:  # of other people's kernels, which raise all kinds
        return first_line(error).rstrip(".")
    return None


def chosen_kernel(
    name: str, device: torch.device, precision: Precision, heads: tuple[int, int], tokens: int
) -> tuple[str, str | None]:
    """Two lines for people: what computes the self-attention of a sample, and where it is slow.

    `heads`: (number, channels). torch chooses by device, dtype and shape; on a CPU it isn't asked.
    """
    if device.type != "cuda":
        return f"attention by {name}", None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kernel, line = name.removeprefix("_native_"), f"attention by {name}"
    if name == NATIVE:
        one = torch.empty(1, tokens, *heads, device=device, dtype=dtype, requires_grad=True)
        kernel = choice_of_torch(one.transpose(1, 2))
        line += f": of torch's kernels {kernel}, for {tokens} tokens of {heads[0]} x {heads[1]}"
        old = kernel == "flash" and torch.cuda.get_device_capability(device) == _HOPPER
        if old and not torch.are_deterministic_algorithms_enabled():  # which rule cuDNN out
            return line, f"{_SLOW} on this card: FlashAttention 2, with cuDNN below 9.15.1; {_SEE}"
    if kernel == "math":
        return line, f"{_SLOW}, and takes memory for tokens x tokens; {_SEE}"
    if kernel == "efficient":
        return line, f"{_SLOW} beside flash and cuDNN's, which need bf16; {_SEE}"
    return line, None


def choice_of_torch(one: torch.Tensor) -> str:
    """For queries, keys and values like (samples, heads, tokens, channels): what
    scaled_dot_product_attention itself asks."""
    chosen: Any = torch._fused_sdp_choice(one, one, one)
    return {
        SDPBackend.MATH.value: "math",
        SDPBackend.FLASH_ATTENTION.value: "flash",
        SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
        SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
    }.get(chosen, f"number {chosen}")


def small_attention(name: str, device: str, precision: Precision) -> torch.Tensor:
    """The output of an attention backend, with its graph. Raises what the backend raises."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query, key, value = (  # (samples, tokens, heads, channels), as Wan has 128 of these
        torch.ones(1, 32, 2, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    with attention_backend(name):
        out: torch.Tensor = dispatch_attention_fn(query, key, value)
    return out


def use_attention(transformer: Any, name: str) -> None:
    """Have a transformer compute attention by `name`, whatever is set elsewhere."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # "experimental feature", for every run
    try:
        transformer.set_attention_backend(name)
    finally:
        logging.set_verbosity(verbosity)
