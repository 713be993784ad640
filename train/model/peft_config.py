"""peft's configuration of a LoRA: `adapter_config.json`, or diffusers' copy of it in a file.

It says what the matrices are multiplied by, which no tensor of peft's files does.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from shared.errors import UserError, first_line

PEFT_METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for peft's configuration
# What is read here, or changes nothing of a LoRA that is trained.
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"}
_HARMLESS = {
    "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "runtime_config", "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip
_PLAIN_STARTS = (True, "gaussian", "eva", "orthogonal")  # others change the base's weights, too
_DEFAULTS = {
    field.name: field.default if field.default is not dataclasses.MISSING else None
    for field in dataclasses.fields(LoraConfig)
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a configuration is applied to."""

    rank: int
    name: str
    """Of its module in the file: what peft's patterns match."""


def peft_alphas(raw: str | bytes, where: str, pairs: Mapping[str, Pair]) -> dict[str, float | int]:
    """Module → alpha so that alpha / rank is peft's scale, whatever its rule.

    `where` names the configuration. Raises UserError for one that is damaged, contradicts the
    ranks, or is of something else than a plain LoRA.
    """
    try:
        config = {
            key.removeprefix("transformer_2.").removeprefix("transformer."): value
            for key, value in json.loads(raw).items()
        }
        alphas, expected = (
            {module: _by_pattern(patterns, module, pair, usual) for module, pair in pairs.items()}
            for usual, patterns in (
                (config["lora_alpha"], config.get("alpha_pattern") or {}),
                (config["r"], config.get("rank_pattern") or {}),
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(
            f"LoRA: {where} is damaged ({first_line(error)}). Expected peft's configuration as "
            "JSON, with r and lora_alpha."
        ) from error
    _refuse_others(config, where)
    for module, pair in pairs.items():
        if pair.rank != expected[module]:
            raise UserError(
                f"LoRA: the matrices of {module} have rank {pair.rank}, {where} says "
                f"{expected[module]}. It is of another file, or damaged: get both again."
            )
    if config.get("use_rslora"):  # scaled by alpha / √rank
        return {m: alpha * math.sqrt(pairs[m].rank) for m, alpha in alphas.items()}
    return alphas


def _by_pattern(patterns: Mapping[str, Any], module: str, pair: Pair, usual: Any) -> Any:
    for name in (pair.name, module):  # files of diffusers may have another layout's names
        if (key := get_pattern_key(list(patterns), name)) in patterns:
            return patterns[key]
    return usual


def _refuse_others(config: Mapping[str, Any], where: str) -> None:
    """UserError for an option of peft's that means more than rank and alpha."""
    for option, value in config.items():
        fine = option in _READ | _HARMLESS or not value or value == _DEFAULTS.get(option)
        if option == "peft_type":
            fine = str(getattr(value, "value", value)).upper() == "LORA"
        elif option == "bias":
            fine = value == "none"
        elif option == "init_lora_weights":
            fine = not value or value in _PLAIN_STARTS
        if not fine:
            raise UserError(
                f"LoRA: {where} has {option}={value!r}, which is not read: it means more than "
                "pairs of matrices. Expected a plain LoRA (merge this one with peft's "
                "merge_and_unload, then use the model: --transformer-path)."
            )
