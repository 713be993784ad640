"""Custom weights in place of a model's expert: `--transformer-path`.

It may be a file (Wan's names, ComfyUI's with their prefix, or diffusers') or a folder: a whole
model, a transformer's folder in either layout, or what a trainer left (`transformer/` inside). Its
config is always the model's: a file has none, and a folder's must not differ from it.
"""

import json
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError, first_line
from shared.io.names import quoted
from shared.models.family import Family
from shared.models.original_layout import expert_folder, is_original, read_json, transformer_config
from shared.models.spec import ModelSpec
from shared.models.tensor_names import is_adapter
from shared.models.wan import ORIGINAL_CLASS
from shared.models.weight_files import DIFFUSERS, INDEX, PICKLED, chosen, indexed
from shared.models.weights import Weights, check_fits, empty_model, filled, read_tensors, weights_of

OPTION = "--transformer-path"
# Fields of a config that don't say what the weights are.
_FREE = ("rope_max_seq_len",)


def own_files(path: Path, component: str) -> list[Path]:
    """The safetensors files that `path` means, of a model folder those of `component`.

    Raises UserError when there are none.
    """
    if path.is_file():
        if path.name.endswith(INDEX):
            return indexed(path, OPTION)
        if path.suffix == ".safetensors":
            return [path]
        why = (
            "it is pickled, and wandistill runs no code of a file"
            if path.suffix in PICKLED
            else f"a {path.suffix or 'file without an ending'} is not read"
        )
        raise UserError(
            f"{OPTION}: {path}: {why}. Expected a .safetensors file, a folder or an index."
        )
    folder = _folder(path, component)
    files = chosen(folder, DIFFUSERS, what=OPTION)
    if not files:
        raise UserError(
            f"{OPTION}: {'no safetensors in ' if folder.is_dir() else 'there is no '}{folder}. "
            "Expected a .safetensors file, a folder with a transformer's, or a model folder."
        )
    return files


def _folder(path: Path, component: str) -> Path:
    if (path / "model_index.json").is_file():
        return path / component
    if any(path.glob("*.safetensors")):
        return path
    if is_original(path):
        return expert_folder(path, component)
    inside = [path / name for name in (component, "transformer") if (path / name).is_dir()]
    return inside[0] if inside else path


def component_config(spec: ModelSpec, component: str) -> dict[str, Any]:
    """diffusers' config of one of the model's transformers, whose weights need not be there."""
    if is_original(spec.folder):
        return transformer_config(spec.folder, component)
    return read_json(spec.folder / component / "config.json", "model")


def empty_transformer(spec: ModelSpec, component: str) -> Any:
    """One of the model's transformers with names and shapes, and no weights."""
    return empty_model(spec.family.load_class(component), component_config(spec, component))


def check_own(path: Path, spec: ModelSpec, component: str) -> None:
    """UserError unless there are files whose weights are of the model's form, by names and shapes,
    and no config beside them that contradicts the model's."""
    _check_config(path, spec, component)
    weights = _own_weights(path, component)
    check_fits(empty_transformer(spec, component), weights, _cure(spec, component))


def _check_config(path: Path, spec: ModelSpec, component: str) -> None:
    folder = own_files(path, component)[0].parent
    if path.is_file() or not (folder / "config.json").is_file():
        return
    try:
        found = _config_of(folder, spec.family)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{OPTION}: {folder}/config.json is no config of a Wan transformer "
            f"({first_line(error)}). Download it again, or give only the weights' file."
        ) from error
    expected = _whole(component_config(spec, component), spec.family)
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name] and name not in _FREE and not name.startswith("_"):
            raise UserError(
                f"{OPTION}: {folder}/config.json has {name}={found[name]!r}, the {component} of "
                f"{spec.folder} {expected[name]!r}. Set --model to the model that it was "
                "finetuned from."
            )


def _config_of(folder: Path, family: Family) -> dict[str, Any]:
    raw = read_json(folder / "config.json", OPTION)
    if raw.get("_class_name") == ORIGINAL_CLASS:
        return transformer_config(folder)
    return _whole(raw, family)


def _whole(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """A config with diffusers' defaults where it is silent, through JSON: tuples are lists."""
    whole = {**empty_model(family.load_class("transformer"), config).config}
    return dict(json.loads(json.dumps(whole)))


def load_own(path: Path, spec: ModelSpec, component: str, *, dtype: torch.dtype) -> Any:
    """A transformer of the model's class in `dtype`, dtypes as `from_pretrained` has them.

    Raises UserError naming the weight that is missing, too many or of another shape.
    """
    _check_config(path, spec, component)
    weights = _own_weights(path, component)
    return filled(
        empty_transformer(spec, component), weights, dtype=dtype, cure=_cure(spec, component)
    )


def _own_weights(path: Path, component: str) -> Weights:
    files = own_files(path, component)
    if all(is_adapter(name) for file in files for name in read_tensors(file)):
        raise UserError(
            f"{OPTION}: {path} is a LoRA. Merge it into the base: --base-lora {quoted(path)}; or "
            f"start the training from it: --init-lora {quoted(path)}"
        )
    one = f"Give the right one: {OPTION} {files[-1]}"
    return weights_of(component, files, path, cure_twice=one)


def _cure(spec: ModelSpec, component: str) -> str:
    return (
        f"Expected a whole transformer of the form of {spec.folder}'s {component}: set --model to "
        "the model that it was finetuned from."
    )
