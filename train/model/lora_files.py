"""LoRA files of others and ours, in any of the forms that Wan LoRAs come in, under global names.

Read are the names of diffusers and peft (`transformer.blocks.0.attn1.to_q.lora_A.weight`), Wan's
own as ComfyUI has them (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`) and kohya's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight`, VideoX-Fun's with two underscores). Where the
strength alpha is written differs: a tensor beside the pair, peft's configuration in the metadata,
or nowhere, which all readers take for alpha = rank.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from shared.errors import UserError, first_line
from shared.models.family import Family, split_layer
from shared.models.spec import FAMILIES, ModelSpec, family_of_layers
from train.model.custom_weights import empty_transformer

Form = Literal["diffusers", "comfyui", "kohya"]
PEFT_METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for peft's configuration

_PREFIX = r"(?P<prefix>(?:(?:base_model\.)?model\.|pipe\.)?(?:[a-z_0-9]+\.)?)"
_KOHYA = r"lora_unet_{{1,2}}{blocks}_(?P<block>\d+)_(?P<module>\w+)\.(?P<part>.+)"
_DOTTED = _PREFIX + r"(?P<blocks>{blocks})\.(?P<block>\d+)\.(?P<module>.+?)\.(?P<part>{parts})"
_PREFIXES = {
    "",
    "transformer.",
    "transformer_2.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",  # peft's own files
    "pipe.dit.",
}
_LOW_NOISE = "transformer_2."
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_A.default.weight": "lora_A",
    "lora_down.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.default.weight": "lora_B",
    "lora_up.weight": "lora_B",
    "alpha": "alpha",
}
# What else is found in files that are called LoRAs.
_OTHER_KINDS = (
    (re.compile(r"\.diff(_b|_m)?$"), "whole weights (.diff, .diff_b), not only a LoRA"),
    (re.compile(r"dora_scale|lora_magnitude_vector"), "a DoRA"),
    (re.compile(r"\.(lokr|hada|oft|boft)_"), "a LoKr, LoHa or OFT"),
    (re.compile(r"lora_(B|up)(\.default)?\.bias$"), "a LoRA with biases"),
    (re.compile(r"lora_mid"), "a LoCon with a third matrix"),
    (re.compile(r"lora_(te|unet_(down|mid|up|input|output)_)"), "a LoRA of another model than Wan"),
)
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """An adapter, free of any file's form: W + (alpha / rank)·B·A for each module."""

    weights: Mapping[str, torch.Tensor]
    """`blocks.0.attn1.to_q.lora_A.weight` (rank, in), `….lora_B.weight` (out, rank), any dtype."""
    alphas: Mapping[str, float]
    """Module, e.g. `blocks.0.attn1.to_q`, → its alpha; its rank is that of its matrices."""

    @classmethod
    def uniform(cls, weights: Mapping[str, torch.Tensor], alpha: float) -> "LoraWeights":
        """With one alpha for all modules, as our own are."""
        modules = {name.rsplit(".lora_", 1)[0] for name in weights}
        return cls(weights=weights, alphas=dict.fromkeys(modules, float(alpha)))

    @property
    def modules(self) -> list[str]:
        """The adapted modules: blocks in their order, layers by name."""
        return sorted(self.alphas, key=lambda name: (split_layer(name)[1], name))

    def down(self, module: str) -> torch.Tensor:
        """A, (rank, in)."""
        return self.weights[f"{module}.lora_A.weight"]

    def up(self, module: str) -> torch.Tensor:
        """B, (out, rank)."""
        return self.weights[f"{module}.lora_B.weight"]

    def rank(self, module: str) -> int:
        return self.down(module).shape[0]

    def scale(self, module: str) -> float:
        """alpha / rank: what B·A is multiplied by."""
        return self.alphas[module] / self.rank(module)

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """The same on the CPU in another dtype, free of any graph."""
        cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.weights.items()}
        return replace(self, weights=cast)

    def delta(
        self, module: str, strength: float = 1.0, device: torch.device | None = None
    ) -> torch.Tensor:
        """What is added to the module's weight, (out, in) in fp32: strength·(alpha / rank)·B·A."""
        product = self.up(module).to(device).float() @ self.down(module).to(device).float()
        return product.mul_(strength * self.scale(module))


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What one file holds."""

    path: Path
    form: Form
    lora: LoraWeights
    metadata: Mapping[str, str]
    """As it stands in the file."""
    alpha_assumed: bool
    """The file has no alpha; the rank was assumed, which is a strength of 1."""
    for_transformer_2: bool
    """Its names begin with `transformer_2.`: a LoRA of the low-noise expert."""

    @property
    def note(self) -> str | None:
        """What to print about it, if anything."""
        if not self.alpha_assumed:
            return None
        return (
            f"{self.path} has no alpha; alpha = rank is assumed (strength 1), as in diffusers "
            "and ComfyUI"
        )


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA in any form, its tensors on the CPU in the dtypes that the file has.

    Raises UserError for a file that cannot be read, holds anything that is not understood, lacks
    half of a pair, or whose shapes, ranks and alphas contradict one another.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    family = min(FAMILIES, key=lambda one: sum(_parse(key, one) is None for key in tensors))
    forms: dict[str, list[str]] = {}
    prefixes: set[str] = set()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        parsed = _parse(key, family)
        if parsed is None:
            unknown.append(key)
            continue
        form, prefix, module, part = parsed
        forms.setdefault(form, []).append(key)
        prefixes.add(prefix)
        if part in parts.setdefault(module, {}):
            both = ": transformer and transformer_2, one LoRA for each expert" * (
                {"transformer.", _LOW_NOISE} <= prefixes
            )
            raise UserError(
                f"LoRA: {path} holds {part} of {module} twice{both}. Expected one LoRA of one "
                "transformer in a file."
            )
        parts[module][part] = tensor
    if unknown:
        raise _not_understood(path, unknown, len(tensors), family)
    if len(forms) != 1:
        found = "; ".join(f"{form}: {keys[0]}" for form, keys in sorted(forms.items()))
        raise UserError(
            f"LoRA: {path} holds {f'names of several forms ({found})' if found else 'no tensors'}. "
            "Expected a LoRA in diffusers', ComfyUI's or kohya's form."
        )
    for module, held in parts.items():
        _check_pair(path, module, held)
    alphas = {module: _alpha(path, module, held) for module, held in parts.items()}
    by_config = _peft_alphas(
        path, metadata, {m: held["lora_A"].shape[0] for m, held in parts.items()}
    )
    assumed = [module for module, alpha in alphas.items() if alpha is None and not by_config]
    return LoraFile(
        path=path,
        form=next(iter(forms)),  # type: ignore[arg-type]
        lora=LoraWeights(
            weights={
                f"{module}.{part}.weight": held[part]
                for module, held in parts.items()
                for part in ("lora_A", "lora_B")
            },
            alphas={
                module: alpha
                if alpha is not None
                else by_config.get(module, float(parts[module]["lora_A"].shape[0]))
                for module, alpha in alphas.items()
            },
        ),
        metadata=metadata,
        alpha_assumed=bool(assumed),
        for_transformer_2=_LOW_NOISE in prefixes,
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. UserError when it is no such file."""
    with _opened(path) as file:
        return file.metadata() or {}


def check_fits(lora: LoraFile, shapes: Mapping[str, torch.Size], model: str) -> None:
    """UserError unless each module is in a transformer, in the LoRA's shape.

    `shapes`: the shapes of the transformer's weights by diffusers' names; `model`: what to call it.
    """
    for module in lora.lora.modules:
        expected = shapes.get(f"{module}.weight")
        if expected is None:
            raise UserError(
                f"LoRA: {lora.path} adapts {_shown(module)}, which {model} does not have. Use the "
                "model that the LoRA was trained on."
            )
        found = (lora.lora.up(module).shape[0], lora.lora.down(module).shape[1])
        if found != tuple(expected):
            raise UserError(
                f"LoRA: {lora.path} adapts {_shown(module)} as a weight of shape {list(found)}; "
                f"{model} has {list(expected)}. Use the model that the LoRA was trained on."
            )


def check_fits_model(lora: LoraFile, spec: ModelSpec, component: str) -> None:
    """UserError unless it fits one of a model's transformers, whose weights need not be there."""
    model = empty_transformer(spec, component)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    check_fits(lora, shapes, f"the {component} of {spec.folder}")


def _shown(module: str) -> str:
    """A module by both of its names: the file's reader may know either."""
    _, block, inside = split_layer(module)
    family = family_of_layers([module])
    return f"{module} ({family.original_blocks}.{block}.{family.original_layers[inside]})"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Block with a safetensors file. UserError when it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        # What safetensors says of a folder or a lost file is "No such device".
        why = "it is a folder" if path.is_dir() else "there is no such file"
        why = first_line(error) if path.is_file() else why
        raise UserError(
            f"LoRA: cannot read {path} as safetensors ({why}). Expected a file that "
            "`wantrain distill` wrote, such as output_dir_distill/lora-low-diffusers.safetensors."
        ) from error


def _parse(key: str, family: Family) -> tuple[Form, str, str, str] | None:
    """(form, prefix, module by its global name, lora_A | lora_B | alpha), None if none of ours."""
    originals = family.lora_layers
    if match := re.fullmatch(_KOHYA.format(blocks=family.original_blocks), key):
        kohya = {name.replace(".", "_"): own for name, own in originals.items()}
        if match["module"] not in kohya or match["part"] not in _PARTS:
            return None
        module = f"{family.blocks}.{match['block']}.{kohya[match['module']]}"
        return "kohya", "lora_unet", module, _PARTS[match["part"]]
    blocks = f"{re.escape(family.blocks)}|{re.escape(family.original_blocks)}"
    match = re.fullmatch(_DOTTED.format(blocks=blocks, parts="|".join(map(re.escape, _PARTS))), key)
    if match is None or match["prefix"] not in _PREFIXES:
        return None
    own_name = (match["blocks"], match["module"])
    if match["blocks"] == family.original_blocks and match["module"] in originals:
        form: Form = "comfyui"
        own_name = (family.blocks, originals[match["module"]])
    elif family.has_layer(".0.".join(own_name)):
        form = "diffusers"
    else:
        return None
    return form, match["prefix"], f".{match['block']}.".join(own_name), _PARTS[match["part"]]


def _not_understood(path: Path, keys: list[str], total: int, family: Family) -> UserError:
    shown = ", ".join(sorted(keys)[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
    kinds = [what for pattern, what in _OTHER_KINDS if any(map(pattern.search, keys))]
    layers = sorted({key.split(".lora")[0] for key in keys if ".lora" in key})
    if kinds:
        what = "it is " + " and ".join(kinds) if kinds[0].startswith("a ") else kinds[0]
    elif layers:
        what = "layers that are no attention or feed-forward layer of a Wan block"
    else:
        what = "names of no known form"
    return UserError(
        f"LoRA: {path}: {len(keys)} of its {total} tensors can't be used, {shown}: {what}. "
        "Expected pairs such as blocks.0.attn1.to_q.lora_A.weight and lora_B (diffusers, ComfyUI "
        f"and kohya names), on {', '.join(family.lora_layers)}."
    )


def _check_pair(path: Path, module: str, held: Mapping[str, torch.Tensor]) -> None:
    for part, others in (("lora_A", "down"), ("lora_B", "up")):
        if part not in held:
            raise UserError(
                f"LoRA: {path} lacks {part} (lora_{others}) of {_shown(module)}; there is only "
                f"{', '.join(sorted(held))}. Its file is damaged: get it again."
            )
    down, up = held["lora_A"], held["lora_B"]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise UserError(
            f"LoRA: {path}: {_shown(module)} has A of shape {list(down.shape)} and B of "
            f"{list(up.shape)}; expected (rank, in) and (out, rank). Its file is damaged: get it "
            "again."
        )


def _alpha(path: Path, module: str, held: Mapping[str, torch.Tensor]) -> float | None:
    if "alpha" not in held:
        return None
    if held["alpha"].numel() != 1:
        raise UserError(
            f"LoRA: {path}: alpha of {_shown(module)} has shape {list(held['alpha'].shape)}; "
            "expected one number. Its file is damaged: get it again."
        )
    return _checked_alpha(path, module, _as_meant(held["alpha"]))


def _as_meant(alpha: torch.Tensor) -> Any:
    """The number that a tensor was made of: 0.3 where fp32 holds 0.300000011920929.

    So that a LoRA has one strength, whichever of its forms is read, and each form gives the others.
    """
    if alpha.dtype != torch.float32:
        return alpha.item()
    return float(str(np.float32(alpha.item())))  # the shortest that is this one in fp32


def _checked_alpha(path: Path, module: str, alpha: Any) -> float:
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(
            f"LoRA: {path}: alpha of {_shown(module)} is {alpha!r}; expected a number. Its file "
            "is damaged: get it again."
        )
    return float(alpha)


def _peft_alphas(
    path: Path, metadata: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, float]:
    """Module → alpha by peft's configuration in the metadata; empty where there is none."""
    if PEFT_METADATA_KEY not in metadata:
        return {}
    try:
        config: dict[str, Any] = {
            key.removeprefix(_LOW_NOISE).removeprefix("transformer."): value
            for key, value in json.loads(metadata[PEFT_METADATA_KEY]).items()
        }
        alphas, expected = (
            {m: other.get(get_pattern_key(list(other), m), usual) for m in ranks}
            for usual, other in (
                (config["lora_alpha"], config.get("alpha_pattern") or {}),
                (config["r"], config.get("rank_pattern") or {}),
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(
            f"LoRA: the {PEFT_METADATA_KEY!r} metadata of {path} is damaged ({first_line(error)}). "
            "Expected peft's configuration as JSON, with transformer.r and transformer.lora_alpha."
        ) from error
    for option, what in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA"), ("lora_bias", "biases")):
        if config.get(option):
            raise UserError(
                f"LoRA: {path} was trained with {what} ({option} in its metadata), which is not "
                "read. Expected a plain LoRA."
            )
    for module, found in ranks.items():
        if found != expected[module]:
            raise UserError(
                f"LoRA: {path}: the matrices of {_shown(module)} have rank {found}, its metadata "
                f"says {expected[module]}. Its file is damaged: get it again."
            )
    return {module: _checked_alpha(path, module, alpha) for module, alpha in alphas.items()}
