"""An adapter as tensors and metadata of the forms that others load.

Each form has a trap (brief, section 5): diffusers takes rank and alpha only from the metadata and
rejects `.alpha` keys; ComfyUI and kohya's tools take alpha from a tensor and without it apply the
LoRA at the strength of alpha = rank.
"""

import json
from collections import Counter
from typing import get_args

import torch

from shared.models.family import split_layer
from shared.models.spec import family_of_layers
from train.model.lora_files import PEFT_METADATA_KEY, Form, LoraWeights

Tensors = dict[str, torch.Tensor]
FORMS: tuple[Form, ...] = get_args(Form)
DIFFUSERS_PREFIX = "transformer."  # for both experts: diffusers ignores "transformer_2." keys


def to_form(lora: LoraWeights, form: Form) -> tuple[Tensors, dict[str, str]]:
    """The adapter's tensors by the form's names, and the metadata without which they mislead.

    comfyui: the original names (`blocks.0.self_attn.q`) below `diffusion_model.`; diffusers reads
    them, too. kohya: these with underscores, for musubi-tuner and ComfyUI; diffusers reads them
    only where all six layers are adapted.
    """
    if form == "diffusers":
        return _diffusers(lora)
    tensors: Tensors = {}
    family = family_of_layers(lora.modules)
    for module in lora.modules:
        _, block, inside = split_layer(module)
        name = f"{family.original_blocks}.{block}.{family.original_layers[inside]}"
        kohya = f"lora_unet_{name.replace('.', '_')}"
        name = kohya if form == "kohya" else f"diffusion_model.{name}"
        tensors[f"{name}.lora_down.weight"] = lora.down(module)
        tensors[f"{name}.lora_up.weight"] = lora.up(module)
        tensors[f"{name}.alpha"] = torch.tensor(lora.alphas[module])
    return tensors, {}


def _diffusers(lora: LoraWeights) -> tuple[Tensors, dict[str, str]]:
    """For `pipe.load_lora_weights`; what differs from the usual rank or alpha is listed."""
    modules = lora.modules
    rank = _usual([lora.rank(module) for module in modules])
    alpha = _usual([lora.alphas[module] for module in modules])
    adapter: dict[str, object] = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    if ranks := {m: lora.rank(m) for m in modules if lora.rank(m) != rank}:
        adapter["rank_pattern"] = ranks
    if alphas := {m: lora.alphas[m] for m in modules if lora.alphas[m] != alpha}:
        adapter["alpha_pattern"] = alphas
    config = {DIFFUSERS_PREFIX + name: value for name, value in adapter.items()}
    return (
        {DIFFUSERS_PREFIX + name: tensor for name, tensor in lora.weights.items()},
        {PEFT_METADATA_KEY: json.dumps(config, sort_keys=True)},
    )


def _usual(values: list[float]) -> float:
    return Counter(values).most_common(1)[0][0]
