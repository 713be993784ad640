"""Names of tensors, as trainers and other programs write them: what stands before the component's
own names, what has no part in it, and what the rest is. No file is read here."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
    "net.",
    "transformer.",
    "transformer_2.",
    "text_encoder.",
    "image_encoder.",
    "first_stage_model.",
    "vae.",
)
COMFYUI = WRAPPERS[:2]
# torch's, which may stand anywhere in a name: compiled, sharded and checkpointed blocks.
_INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
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

    A wrapper is taken off where it stands before all of them; torch's own wherever they stand.
    """
    state = _renamed(tensors, without_torch)
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
            return _renamed(own, partial(re.sub, f"^{re.escape(prefix)}", ""))
    return state


def without_torch(name: str) -> str:
    """A name without what torch's wrappers of modules put into it."""
    return _INSIDE.sub("", name)


def _renamed(state: Mapping[str, Value], bare: Callable[[str], str]) -> dict[str, Value]:
    """Under other names; those that would be one keep theirs, and are found to be too many."""
    same = Counter(map(bare, state))
    return {bare(name) if same[bare(name)] == 1 else name: state[name] for name in state}


def wrappers_of(component: str) -> list[str]:
    """What may stand before its names."""
    return [w for w in WRAPPERS if component in _PLACES.get(w, (component,))]


def _wrapper(component: str, names: Iterable[str]) -> str | None:
    own = [name for name in names if name != SCALED_MARKER]
    fit = wrappers_of(component) if own else []
    return next((w for w in fit if all(name.startswith(w) for name in own)), None)


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
