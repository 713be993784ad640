"""Names of tensors in LoRA files, whatever trainer, wrapper and form they are of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shared.models.family import Family, star_block
from shared.models.tensor_names import without_torch, wrappers_of

Form = Literal["diffusers", "comfyui", "kohya"]
Part = Literal["lora_A", "lora_B", "lora_B.bias", "alpha", "diff", "diff_b"]
LOW_NOISE = "transformer_2."

_WRAPPERS = (*wrappers_of("transformer_2"), "pipe.", "dit.", "base_model.")
_KOHYA = re.compile(r"lora_unet_{1,2}")
_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # peft's name of the adapter
_WEIGHT = rf"{_ADAPTER}(?:\.weight)?"  # left out by some
# A pair's matrices, its bias and alpha; differences of whole weights.
_PARTS: Mapping[Part, re.Pattern[str]] = {
    "lora_A": re.compile(rf"(.+?)[._]lora(?:_A|_down|\.down|_linear_layer\.down){_WEIGHT}"),
    "lora_B": re.compile(rf"(.+?)[._]lora(?:_B|_up|\.up|_linear_layer\.up){_WEIGHT}"),
    "lora_B.bias": re.compile(rf"(.+?)\.lora_(?:B|up){_ADAPTER}\.bias"),
    "alpha": re.compile(r"(.+)\.alpha"),
    "diff": re.compile(r"(.+)\.diff"),
    "diff_b": re.compile(r"(.+)\.diff_b"),
}


@dataclass(frozen=True)
class Parsed:
    """What a tensor is."""

    form: Form | None
    """None: the name is the same in several."""
    low_noise: bool
    """Whether it says that it is of the low-noise expert."""
    name: str
    """Of its module (or bare weight) in the file, without wrappers."""
    module: str
    """The same by the class of the family's transformer."""
    part: Part


def parse(key: str, family: Family) -> Parsed | None:
    """None where the name is of nothing that the family's transformer has."""
    bare, low_noise = without_torch(key), False
    while wrapper := next((w for w in _WRAPPERS if bare.startswith(w)), None):
        low_noise = low_noise or wrapper == LOW_NOISE
        bare = bare.removeprefix(wrapper)
    if kohya := _KOHYA.match(bare):
        bare = bare[kohya.end() :]
    if bare.endswith(".diff_m"):  # of a block's modulation, or the head's
        bare = bare.removesuffix(".diff_m") + f"{'_' if kohya else '.'}modulation.diff"
    matches = ((part, pattern.fullmatch(bare)) for part, pattern in _PARTS.items())
    part, match = next((one for one in matches if one[1]), (None, None))
    if part is None or match is None:
        return None
    found = _of_kohya(match[1], family) if kohya else _dotted(match[1], family)
    if found is None:
        return None
    form, module = found
    is_bare = star_block(module, family.blocks)[0] in family.bare_weights
    return None if is_bare and part != "diff" else Parsed(form, low_noise, match[1], module, part)


def _dotted(name: str, family: Family) -> tuple[Form | None, str] | None:
    starred, number = star_block(name, family.original_blocks)
    original = family.names.get(starred)
    if family.has(name):
        return (None if original == starred else "diffusers"), name
    return None if original is None else ("comfyui", original.replace("*", number))


def _of_kohya(name: str, family: Family) -> tuple[Form, str] | None:
    blocks = family.original_blocks.replace(".", "_")
    match = re.fullmatch(rf"{blocks}_(\d+)_(\w+)", name)
    starred, number = (f"{blocks}_*_{match[2]}", match[1]) if match else (name, "")
    known = {original.replace(".", "_"): own for original, own in family.names.items()}
    return ("kohya", known[starred].replace("*", number)) if starred in known else None


def written(module: str, family: Family, form: Form) -> str:
    """The name before a part, as a form has it; of bare weights only ComfyUI's."""
    if form == "diffusers":
        return f"transformer.{module}"
    original = family.original(module)
    if form == "kohya":
        return f"lora_unet_{original.replace('.', '_')}"
    return f"diffusion_model.{original}"
