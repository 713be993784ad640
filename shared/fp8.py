"""8-bit weights as ComfyUI and Kijai distribute them, taken to what they stand for.

A plain fp8 file holds the rounded weights themselves. A scaled one holds, beside a layer's fp8
`weight`, a number to multiply it by: `scale_weight` in the older files (marked by a tensor called
`scaled_fp8`), `weight_scale` in the newer ones (which say the format of each layer in
`comfy_quant`, JSON as bytes). The scales of the activations beside them, `scale_input` and
`input_scale`, serve fp8 arithmetic alone. (ComfyUI's QUANTIZATION.md and its state dicts.)
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from shared.errors import UserError, first_line

State = dict[str, torch.Tensor]
FORMATS = ("float8_e4m3fn", "float8_e5m2")
FULL_MATRIX_MULT = "full_precision_matrix_mult"  # how ComfyUI computes, not what the weights are
SCALES = ("scale_weight", "weight_scale")
_MARKER, _LAYER_FORMAT = "scaled_fp8", "comfy_quant"
_OF_ACTIVATIONS = ("scale_input", "input_scale")


def plain(state: State, dtype_of: Callable[[str], torch.dtype], source: Path) -> State:
    """The weights of a file in the dtype wanted for each, scales multiplied in (in fp32).

    Tensors that are in their dtype already are passed on untouched (memory-mapped, it may be).
    Raises UserError naming a weight of another quantisation: int8, nvfp4, mxfp8, scales by block.
    """
    scales: State = {}
    weights: State = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if kind in SCALES:
            scales[f"{layer}.weight"] = tensor
        elif kind == _LAYER_FORMAT:
            _check_format(layer, tensor, source)
        elif kind not in (_MARKER, *_OF_ACTIVATIONS):
            weights[name] = tensor
    if lost := sorted(scales.keys() - weights.keys()):
        raise UserError(
            f"model: {source} has a scale for {lost[0]}, but not that weight. Its file is damaged: "
            "get it again."
        )
    result: State = {}
    for name, tensor in weights.items():
        if not tensor.dtype.is_floating_point:
            raise _unreadable(f"{name} is {str(tensor.dtype).removeprefix('torch.')}", source)
        if name in scales:
            tensor = tensor.float() * _as_factor(name, scales[name], tensor.shape, source)
        result[name] = tensor.to(dtype_of(name))
    return result


def _as_factor(name: str, scale: torch.Tensor, shape: torch.Size, source: Path) -> torch.Tensor:
    """A scale, one for the weight or one for each of its rows, so that it multiplies the weight."""
    rows = (shape[0], *(1 for _ in shape[1:]))
    of_rows = tuple(scale.shape) in ((shape[0],), rows)
    if not scale.dtype.is_floating_point or not (scale.numel() == 1 or of_rows):
        raise _unreadable(
            f"the scale of {name} ({list(shape)}) has shape {list(scale.shape)} in "
            f"{str(scale.dtype).removeprefix('torch.')}",
            source,
        )
    return scale.float().reshape(rows if of_rows else ())


def _check_format(layer: str, tensor: torch.Tensor, source: Path) -> None:
    try:
        told = json.loads(bytes(tensor.tolist()))
        what, more = told["format"], sorted(told.keys() - {"format", FULL_MATRIX_MULT})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"model: {source}: the format of {layer} can't be read ({first_line(error)}). Its file "
            "is damaged: get it again."
        ) from error
    if what not in FORMATS or more:
        raise _unreadable(f"{layer} is {what}{' with ' + ', '.join(more) if more else ''}", source)


def _unreadable(what: str, source: Path) -> UserError:
    return UserError(
        f"model: {source} is quantised in a way that is not read: {what}. Expected fp32, fp16, "
        "bf16, or fp8 (e4m3fn, e5m2) with at most one scale a weight or a row: get one of these."
    )
