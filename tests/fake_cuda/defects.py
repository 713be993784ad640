"""Defects, put in by hand: each must turn the net red, or the net sees nothing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_wan

from shared.models.wan import WAN
from tests.fake_cuda.cases import PLAIN_LORA, Case
from train.memory.activation_offload import ActivationOffloading
from train.memory.copy_stream import Copy, SideStream
from train.methods import flow_matching
from train.model import base
from train.model.roles import Roles

MODEL = "wan2.1-t2v-1.3b"
CHEAPEST = Case(MODEL, PLAIN_LORA)


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A patch, the case that runs with it, and what the net must say (regular expression)."""

    patch: Callable[[], AbstractContextManager[Any]]
    said: str
    case: Case = CHEAPEST


def _instead(owner: Any, name: str, made: Callable[..., Any]) -> AbstractContextManager[Any]:
    """`made` gets the original first, then its arguments."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        return made(original, *args, **kwargs)

    return mock.patch.object(owner, name, patched)


def _in_loss(look: Callable[[torch.Tensor], object]) -> Callable[[], AbstractContextManager[Any]]:
    """The loss first looks at the velocity."""

    def loss(original: Any, velocity: torch.Tensor, *others: Any) -> Any:
        look(velocity)
        return original(velocity, *others)

    return lambda: _instead(flow_matching, "flow_matching_loss", loss)


def _under_autocast(*norms: str) -> Callable[[], AbstractContextManager[Any]]:
    kept = tuple(name for name in WAN.outside_autocast if name not in norms)
    family = replace(WAN, outside_autocast=kept)
    return lambda: mock.patch.object(base, "family_of", lambda _: family)


def _twice(original: Any, *args: Any, **kwargs: Any) -> Any:
    original(*args, **kwargs)
    return original(*args, **kwargs)


def _values_fp32(original: Any, *args: Any) -> Any:
    query, key, value = original(*args)
    return query, key, value.float()


def _waiting(original: Any, self: Any, target: torch.Tensor, source: torch.Tensor) -> Copy:
    with torch.no_grad():
        target.copy_(source)
    return Copy()


DEFECTS: Mapping[str, Defect] = {
    "a tensor left on the CPU": Defect(
        patch=lambda: mock.patch.object(flow_matching, "to_device", lambda tensor, _: tensor),
        said="at least two devices",
    ),
    "noise that is copied while the CPU waits": Defect(
        patch=lambda: mock.patch.object(flow_matching, "to_device", torch.Tensor.to),
        said="waits for the device: copy to the device at flow_matching",
    ),
    "an item()": Defect(
        patch=_in_loss(lambda v: v.mean().item()),
        said="waits for the device: _local_scalar_dense at flow_matching:velocity_loss",
    ),
    "a branch on a tensor": Defect(
        patch=_in_loss(lambda v: bool(v.isnan().any())),
        said="waits for the device: _local_scalar_dense at flow_matching:velocity_loss",
    ),
    "a copy to the CPU": Defect(
        patch=_in_loss(torch.Tensor.cpu),
        said="waits for the device: copy to the CPU at flow_matching:velocity_loss",
    ),
    "a selection by a mask": Defect(
        patch=_in_loss(lambda v: v[v > 0]),
        said="waits for the device: index at flow_matching:velocity_loss",
    ),
    "places that are not zero": Defect(
        patch=_in_loss(torch.nonzero),
        said="waits for the device: nonzero at flow_matching:velocity_loss",
    ),
    "q's and k's norms under autocast": Defect(
        patch=_under_autocast(".norm_q", ".norm_k"),
        said="attention: float32, float32, bfloat16",
    ),
    "the image keys' norm under autocast": Defect(
        patch=_under_autocast(".norm_added_k"),
        said="attention: bfloat16, float32, bfloat16",
        case=Case("wan2.1-i2v-14b-480p", PLAIN_LORA),
    ),
    "values in fp32": Defect(
        patch=lambda: _instead(transformer_wan, "_get_qkv_projections", _values_fp32),
        said="attention: bfloat16, bfloat16, float32",
    ),
    "an fp32 activation": Defect(
        patch=lambda: _instead(GELU, "forward", lambda original, *args: original(*args).float()),
        said="fp32 as large as an activation: _to_copy at attention:FeedForward",
    ),
    "a pass too many": Defect(
        patch=lambda: _instead(Roles, "velocity", _twice),
        said="lora, tflop",
    ),
    "no checkpointing where it is asked for": Defect(
        patch=lambda: mock.patch.object(
            transformer_wan.WanTransformer3DModel, "enable_gradient_checkpointing"
        ),
        said="lora, tflop",
    ),
    "blocks that the CPU waits for": Defect(
        patch=lambda: _instead(SideStream, "copy", _waiting),
        said="waits for the device: copy to the device at",
        case=Case(MODEL, "low vram"),
    ),
    "activations that stay on the device": Defect(
        patch=lambda: mock.patch.object(
            ActivationOffloading, "_put_away", lambda self, place, saved: saved
        ),
        said="copies_out: found 0",
        case=Case(MODEL, "activation offloading"),
    ),
}
