"""8-bit weights as ComfyUI and Kijai distribute them, taken to what they stand for.

A plain fp8 file holds the rounded weights themselves. A scaled one holds, beside a layer's fp8
`weight`, a number to multiply it by: `scale_weight` in the older files (marked by a tensor called
`scaled_fp8`), `weight_scale` in the newer ones (which say the format of each layer in
`comfy_quant`, JSON as bytes). The scales of the activations beside them, `scale_input` and
`input_scale`, serve only fp8 arithmetic. (ComfyUI's QUANTIZATION.md and its state dicts.)
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from shared.errors import UserError, first_line
from shared.models.tensor_names import SCALED_MARKER

State = dict[str, torch.Tensor]
FORMATS = ("float8_e4m3fn", "float8_e5m2")
FULL_MATRIX_MULT = "full_precision_matrix_mult"  # how ComfyUI computes, not what the weights are
SCALES = ("scale_weight", "weight_scale")
_LAYER_FORMAT = "comfy_quant"
_OF_ACTIVATIONS = ("scale_input", "input_scale")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_NOT_READ = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
    if hasattr(torch, name)
)
_BUFFERS = ("num_batches_tracked", "position_ids")  # integers, and no codes of weights
# Of a text encoder: they have two sides, too, and nobody scales them.
_TABLES = ("shared.weight", "token_embedding.weight", "embed_tokens.weight",
           "relative_attention_bias.weight", "pos_embedding.embedding.weight")  # fmt: skip


def split(state: Mapping[str, torch.Tensor], source: Path) -> tuple[State, State]:
    """(weights as they are stored, scale of each weight that has one, by the weight's name).

    Raises UserError naming a scale or a weight of which the other is lost, and a weight of another
    quantisation: int8, nvfp4, mxfp8, scales by block.
    """
    scales: State = {}
    weights: State = {}
    marked_fp8: dict[str, torch.Tensor] = {}
    activations: dict[str, str] = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        weight = f"{layer}.weight"
        if kind in SCALES:
            if weight in scales:
                raise _damaged(f"has two scales for {weight}", source)
            scales[weight] = tensor
        elif kind == _LAYER_FORMAT:
            marked_fp8[weight] = tensor
        elif kind in _OF_ACTIVATIONS:
            activations[name] = weight
        elif name != SCALED_MARKER:
            weights[name] = tensor
    for weight, described in marked_fp8.items():
        _check_format(weight.removesuffix(".weight"), described, source)
    if lost := sorted(scales.keys() - weights.keys()):
        raise _damaged(f"has a scale for {lost[0]}, but not that weight", source)
    for name, scale in scales.items():
        _check_scale(name, scale, weights[name], source)
    for name, weight in activations.items():
        if weight not in weights or weights[weight].dtype not in _FP8:
            held = f"is {_called(weights[weight].dtype)}" if weight in weights else "is not there"
            raise _damaged(f"has {name}, a scale of fp8 arithmetic, but {weight} {held}", source)
    for name, tensor in weights.items():
        number = tensor.dtype.is_floating_point or name.rpartition(".")[2] in _BUFFERS
        if tensor.dtype in _NOT_READ or not number:
            raise _unreadable(f"{name} is {_called(tensor.dtype)}", source)
    for weight in marked_fp8:
        if weight not in weights or weights[weight].dtype not in _FP8:
            held = f"it is {_called(weights[weight].dtype)}" if weight in weights else "not there"
            raise _damaged(f"marks {weight} as fp8, but {held}", source)
    if scales or marked_fp8 or SCALED_MARKER in state:
        # A matrix or kernel that has none has lost it: ComfyUI scales all that it brings to fp8.
        lacking = [
            name
            for name, tensor in weights.items()
            if tensor.dtype in _FP8
            and tensor.ndim > 1
            and name not in scales
            and not name.endswith(_TABLES)
        ]
        if lacking:
            raise _damaged(
                f"is a file of scaled fp8 weights, but {len(lacking)} of them have no scale, the "
                f"first {min(lacking)}",
                source,
            )
    return weights, scales


def plain(
    weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What a stored weight stands for: in `dtype`, or in its own if that is no fp8, else fp32.

    A scale is multiplied in fp32. A tensor that is in its dtype already is passed on untouched
    (memory-mapped, it may be).
    """
    if dtype is None:
        dtype = torch.float32 if weight.dtype in _FP8 else weight.dtype
    if scale is not None:
        of_rows = scale.numel() == weight.shape[0] and scale.numel() > 1
        weight = weight.float() * scale.float().reshape(_rows(weight.shape) if of_rows else ())
    return weight.to(dtype)


def _check_scale(name: str, scale: torch.Tensor, weight: torch.Tensor, source: Path) -> None:
    """One for the weight or one for each of its rows, of a weight that is fp8."""
    shape = weight.shape
    of_rows = len(shape) > 0 and tuple(scale.shape) in ((shape[0],), _rows(shape))
    if not scale.dtype.is_floating_point or not (scale.numel() == 1 or of_rows):
        raise _unreadable(
            f"the scale of {name} ({list(shape)}) has shape {list(scale.shape)} in "
            f"{_called(scale.dtype)}",
            source,
        )
    if not torch.isfinite(scale.float()).all():
        raise _damaged(f"has a scale for {name} that is not finite", source)
    if weight.dtype.is_floating_point and weight.dtype not in _FP8:
        raise UserError(
            f"model: {source} has a scale for {name}, which is {_called(weight.dtype)}, not fp8: "
            "nothing tells whether it is multiplied in already. Get the file as it was published, "
            "or one without scales."
        )


def _rows(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0], *(1 for _ in shape[1:]))


def _check_format(layer: str, tensor: torch.Tensor, source: Path) -> None:
    try:
        found = json.loads(bytes(tensor.tolist()))
        what, more = found["format"], sorted(found.keys() - {"format", FULL_MATRIX_MULT})
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(
            f"marks {layer} with a format that can't be read ({first_line(error)})", source
        ) from error
    if what not in FORMATS or more:
        raise _unreadable(f"{layer} is {what}{' with ' + ', '.join(more) if more else ''}", source)


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _damaged(how: str, source: Path) -> UserError:
    return UserError(f"model: {source} {how}. It is damaged: get it again.")


def _unreadable(what: str, source: Path) -> UserError:
    return UserError(
        f"model: {source} is quantised in a way that is not read: {what}. Expected fp32, fp16, "
        "bf16, or fp8 (e4m3fn, e5m2) with at most one scale a weight or a row: get one of these."
    )
