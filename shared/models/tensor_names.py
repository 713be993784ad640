"""Names of tensors, as trainers and other programs write them: what stands before the component's
own names, what has no part in it, and what the rest is. No file is read here."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

# What may stand before every name of a file: ComfyUI's, torch's and peft's wrappers, a component's
# place in a larger model.
WRAPPERS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "_orig_mod.",
    "module.",
    "model.",
    "transformer.",
    "transformer_2.",
    "text_encoder.",
    "image_encoder.",
    "first_stage_model.",
    "vae.",
)
COMFYUI = WRAPPERS[:2]
# Those that say which component it is.
_PLACES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*COMFYUI, "transformer."), ("transformer", "transformer_2")),
    "transformer_2.": ("transformer_2",),
    "text_encoder.": ("text_encoder",),
    "image_encoder.": ("image_encoder",),
    "first_stage_model.": ("vae",),
    "vae.": ("vae",),
}
# ComfyUI's files that are a whole model: what the transformer is not.
_REST_OF_ALL_IN_ONE = re.compile(
    r"(vae|text_encoders|clip_vision|first_stage_model|cond_stage_model|conditioner)\..*"
)
SCALED_MARKER = "scaled_fp8"
# What has no part in the component: the other halves of the models that they are cut from, buffers
# that count up, a tokenizer in a tensor.
_NO_PART: Mapping[str, re.Pattern[str]] = {
    "text_encoder": re.compile(r"decoder\..*|lm_head\..*|spiece_model"),
    "image_encoder": re.compile(
        r"text_model\..*|(visual|text)_projection\..*|logit_scale|(.*\.)?position_ids"
        r"|textual\..*|log_scale|visual\.head(\..*)?"
    ),
}

_ADAPTER = re.compile(
    r"lora_|lora\.|hada_|lokr_|(^|[._])oft_|\.alpha$|\.diff(_[bm])?$|\.set_weight$|base_layer\.|dora_scale"
    r"|magnitude_vector|(^|[._])(boft|ia3|vera)_"
)
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)|^ema_|_ema_")
# What tensors are that a component has no place for: (pattern, in words, cure).
_KINDS = (
    (
        _ADAPTER,
        "an adapter (a LoRA or the like), which would be left out",
        "Merge it into the weights (of a transformer: wantrain merge, or --base-lora), or take its "
        "tensors out.",
    ),
    (
        _AVERAGE,
        "a second copy of the weights (an average, EMA)",
        "Take the one out that is not meant.",
    ),
    (
        re.compile(
            r"scale(?!_shift)|absmax|quant_(map|state)|nested_|\.SCB$|qweight|qzeros|zero_point"
        ),
        "scales or codes of a quantisation that is not read",
        "Expected fp32, fp16, bf16, or fp8 with at most one scale a weight or a row: get one of "
        "these.",
    ),
)


def unwrapped(component: str, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """A component's tensors by their own names, without what has no part in it.

    A wrapper is taken off where it stands before all of them.
    """
    state = dict(tensors)
    if component in ("transformer", "transformer_2"):
        state = _of_transformer(state)
    while wrapper := _wrapper(component, state):
        state = {
            name if name == SCALED_MARKER else name.removeprefix(wrapper): value
            for name, value in state.items()
        }
    if (no_part := _NO_PART.get(component)) is not None:
        state = {name: value for name, value in state.items() if not no_part.fullmatch(name)}
    return state


def _of_transformer(state: dict[str, Value]) -> dict[str, Value]:
    """Without ComfyUI's prefix, and text encoder and VAE of a file that is all in one."""
    for prefix in COMFYUI:
        if any(name.startswith(prefix) for name in state):
            own = {
                name: value
                for name, value in state.items()
                if not _REST_OF_ALL_IN_ONE.fullmatch(name)
            }
            # A name that is there without it, too, keeps it, and is found to be too many.
            return {
                name if (bare := name.removeprefix(prefix)) in own else bare: value
                for name, value in own.items()
            }
    return state


def _wrapper(component: str, names: Iterable[str]) -> str | None:
    own = [name for name in names if name != SCALED_MARKER]
    fit = [w for w in WRAPPERS if component in _PLACES.get(w, (component,))]
    return next((w for w in fit if own and all(name.startswith(w) for name in own)), None)


def is_adapter(name: str) -> bool:
    """Whether a tensor is part of a LoRA or of an adapter like it."""
    return _ADAPTER.search(name) is not None


def never_weights(names: Iterable[str]) -> list[str]:
    """Those names, in order, that no component has: of an adapter, else of an average."""
    listed = sorted(names)
    for pattern in (_ADAPTER, _AVERAGE):
        if found := [name for name in listed if pattern.search(name)]:
            return found
    return []


def kind_of(names: Iterable[str]) -> tuple[str, str] | None:
    """What tensors are that a component has no place for, and the cure; None where unknown."""
    listed = list(names)
    for pattern, words, cure in _KINDS:
        if all(pattern.search(name) for name in listed):
            return words, cure
    return None
