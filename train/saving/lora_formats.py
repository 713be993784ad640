"""An adapter as tensors and metadata of the forms that others load.

Each form has a trap (brief, section 5): diffusers takes rank and alpha only from the metadata and
rejects `.alpha` keys; ComfyUI and kohya's tools take alpha from a tensor and without it apply the
LoRA at the strength of alpha = rank.
"""

import json
from collections import Counter
from typing import get_args

import torch

from train.model.lora_files import LoraWeights
from train.model.lora_names import Form, written
from train.model.peft_config import PEFT_METADATA_KEY

Tensors = dict[str, torch.Tensor]
FORMS: tuple[Form, ...] = get_args(Form)
DIFFUSERS_PREFIX = "transformer."  # for both experts: diffusers ignores "transformer_2." keys


def to_form(lora: LoraWeights, form: Form) -> tuple[Tensors, dict[str, str]]:
    """The adapter's tensors by the form's names, and the metadata without which they mislead.

    comfyui: the original names (`blocks.0.self_attn.q`) below `diffusion_model.`; diffusers reads
    them, too. kohya: these with underscores, for musubi-tuner and ComfyUI; diffusers reads them
    only where all six layers are adapted. Differences of whole weights are ComfyUI's alone.
    """
    assert form == "comfyui" or not lora.diffs
    if form == "diffusers":
        return _diffusers(lora)
    tensors: Tensors = {}
    family = lora.family
    for module in lora.modules:
        name = written(module, family, form)
        tensors[f"{name}.lora_down.weight"] = lora.down(module)
        tensors[f"{name}.lora_up.weight"] = lora.up(module)
        tensors[f"{name}.alpha"] = torch.tensor(lora.alphas[module])
    for weight, diff in lora.diffs.items():
        module, _, kind = weight.rpartition(".")
        if kind in ("weight", "bias"):
            tensors[f"{written(module, family, form)}.diff{'_b' * (kind == 'bias')}"] = diff
        else:
            name = written(weight, family, form)
            part = ".diff_m" if name.endswith(".modulation") else ".diff"
            tensors[name.removesuffix(".modulation") + part] = diff
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
