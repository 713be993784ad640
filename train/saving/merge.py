"""`wantrain merge`: a model folder whose transformers have LoRAs added to their weights.

Only the transformers that a LoRA is for are written anew, tensor by tensor. Everything else of the
folder goes along: weights as hard links where the file system allows it, other files as copies.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from rich.console import Console
from rich.progress import track

from shared.cli import support
from shared.errors import UserError
from shared.io.durable import building_folder, fsync_folder, link, rename, write_json
from shared.models.original_layout import COMPONENT_NAMES, expert_folder, is_original
from shared.models.original_weights import converted
from shared.models.spec import ModelSpec, read_model_spec, resolve_model
from shared.models.tensor_names import COMFYUI, unwrapped
from shared.models.weight_files import weight_files
from shared.models.weights import check_component, model_weights, read_tensors
from train.model.base import base_digest, component_of
from train.model.lora_files import LoraFile, check_fits, read_lora
from train.options import Expert
from train.saving.config import MergeConfig
from train.saving.provenance import METADATA_KEY, check_expert, read_provenance, wrong_base
from train.saving.safetensors_io import dtype_name, write_stream

PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".pth", ".pt"}
FLOATS = {"F64", "F32", "F16", "BF16"}  # sums rounded to fp8 would lose most of a LoRA


@dataclass(frozen=True)
class _Addition:
    """A LoRA and the expert whose weights it is added to."""

    lora: LoraFile
    expert: Expert


def merge(config: MergeConfig, console: Console) -> None:
    """Write the merged model folder, whole or not at all. UserError for all that can't be done."""
    say = partial(support.say, console)
    spec = read_model_spec(resolve_model(config.model, ["*"]))
    additions = [_addition(path, spec, config.boundary_type) for path in config.lora]
    single = any(addition.expert == "full" for addition in additions) and spec.two_experts
    _refuse_mixed(additions, spec, single=single)
    transformers: dict[str, _Transformer] = {}
    for addition in additions:
        component = component_of(addition.expert)
        if component not in transformers:
            transformers[component] = _Transformer(spec, component)
        transformers[component].add(addition.lora)
        for warning in _warnings(addition, spec):
            say(f"warning  {warning}", style="yellow")
    for transformer in transformers.values():
        transformer.plan(config.max_shard_size)

    if config.output.resolve().is_relative_to(spec.folder.resolve()):
        raise UserError(
            f"--output: {config.output} lies inside the model's folder. Choose one outside of it."
        )
    left_out = [spec.folder / "transformer_2"] if single else []
    sources = [_metadata(addition, config.lora_scale) for addition in additions]
    try:
        with building_folder(config.output.absolute()) as building:
            _take_along(spec.folder, building, left_out, [t.folder for t in transformers.values()])
            if single:
                _write_single_expert(building)
            for component, transformer in transformers.items():
                transformer.write(building, config.lora_scale, sources, console)
                changed = f"{transformer.merged} weights changed"
                say(f"merged   {component}: {changed}, {transformer.size:.3g} GB")
            fsync_folder(building)
            if config.output.is_dir():
                config.output.rmdir()  # empty, as was checked
            rename(building, config.output.absolute())
            fsync_folder(building.parent)
    except OSError as error:
        raise UserError(
            f"--output: can't write {config.output} ({error.strerror or error}). Nothing was "
            "kept; free some space or choose another folder."
        ) from error
    say(f"model    {config.output}")


def _addition(path: Path, spec: ModelSpec, wanted: Expert | None) -> _Addition:
    lora = read_lora(path)
    expert: Expert
    if METADATA_KEY in lora.metadata:
        expert = read_provenance(path).expert
    elif lora.for_transformer_2:
        expert = "low"
    elif not spec.two_experts:
        expert = "full"
    elif wanted is not None:
        return _Addition(lora, wanted)
    else:
        raise UserError(
            f"--lora: {path} does not name its expert, and {spec.folder} has two. Name "
            "it: --boundary-type high, low, or full for one LoRA for all steps."
        )
    if wanted is not None and wanted != expert:
        raise UserError(
            f"--boundary-type: found {wanted}, but {path} is for {expert}. Leave it out, or merge "
            "the LoRAs in two runs."
        )
    check_expert(path, expert, spec)
    return _Addition(lora, expert)


def _refuse_mixed(additions: Sequence[_Addition], spec: ModelSpec, *, single: bool) -> None:
    experts = sorted({addition.expert for addition in additions})
    if single and experts != ["full"]:
        raise UserError(
            f"--lora: found LoRAs for {', '.join(experts)}; a full one replaces the "
            "low-noise expert. Give high and low ones, or only full ones."
        )
    if single and is_original(spec.folder):
        raise UserError(
            f"--lora: {additions[0].lora.path} is one LoRA for all steps, and a folder in Wan's "
            "original layout can't leave the low-noise expert out. Use the model in diffusers' "
            "layout."
        )


def _warnings(addition: _Addition, spec: ModelSpec) -> Iterable[str]:
    if addition.lora.note:
        yield addition.lora.note
    if METADATA_KEY in addition.lora.metadata:
        path = addition.lora.path
        found = base_digest(spec.folder, component_of(addition.expert))
        if warning := wrong_base(path, read_provenance(path), found, str(spec.folder)):
            yield warning


def _metadata(addition: _Addition, scale: float) -> dict[str, Any]:
    """Metadata of the merged files about one LoRA."""
    provenance = addition.lora.metadata.get(METADATA_KEY)
    return {
        "file": addition.lora.path.name,
        "expert": addition.expert,
        "lora_scale": scale,
        "provenance": json.loads(provenance) if provenance else None,
    }


class _Transformer:
    """One expert's weights, its LoRAs, and the files that it will lie in."""

    def __init__(self, spec: ModelSpec, component: str) -> None:
        model = spec.folder
        original = is_original(model)
        self.folder = expert_folder(model, component) if original else model / component
        self._inside = self.folder.relative_to(model)
        files = weight_files(model, component)
        stored = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
        if not files:
            raise UserError(
                f"model: {self.folder} holds no safetensors; pickled weights are not read. Use a "
                "folder with safetensors."
            )
        check_component(spec.family, model, component)
        weights = model_weights(model, component)
        if weights.scales:
            raise UserError(
                f"model: {weights.source} holds {len(weights.scales)} fp8 weights with scales "
                "beside them, to which nothing can be added. Use the model in bf16 or fp32."
            )
        itself = {name: name for name in stored}
        # diffusers' name → the name in the files
        self._names = converted(component, itself)
        # The name in the files → the one that is written, without what a trainer's wrapper put
        # before it: other programs ignore a name that is not quite theirs. ComfyUI's stay.
        self._written = itself
        if not original:
            self._written = {old: new for new, old in self._names.items()}
        elif not any(name.startswith(COMFYUI) for name in itself):
            self._written = {old: new for new, old in unwrapped(component, itself).items()}
        # Mapped, not read
        self._stored = {old: stored[old] for old in self._written}
        self._source = weights.source
        # The name in the files → its LoRAs, and what these call it
        self._loras: dict[str, list[tuple[LoraFile, str]]] = {}

    @property
    def merged(self) -> int:
        """How many of its weights change."""
        return len(self._loras)

    @property
    def size(self) -> float:
        """Of all its weights, in GB."""
        return sum(tensor.nbytes for tensor in self._stored.values()) / 1e9

    def add(self, lora: LoraFile) -> None:
        """Merge this one, too. UserError when it is of another model."""
        shapes = {
            name: self._stored[own].shape
            for name, own in self._names.items()
            if own in self._stored
        }
        check_fits(lora, shapes, str(self.folder))
        for name in lora.lora.changed:
            own = self._names[name]
            dtype = dtype_name(self._stored[own].dtype)
            if dtype not in FLOATS:
                raise UserError(
                    f"model: {self._source} holds {own} as {dtype}, to which nothing can be added. "
                    "Use the model in bf16 or fp32."
                )
            self._loras.setdefault(own, []).append((lora, name))

    def plan(self, max_shard_size: str) -> None:
        """Decide what lies in which file."""
        try:
            self._split = split_state_dict_into_shards_factory(
                {new: self._stored[old] for old, new in self._written.items()},
                get_storage_size=lambda tensor: tensor.nbytes,
                filename_pattern=PATTERN,
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise UserError(
                f"--max-shard-size: found {max_shard_size!r}, expected a size such as 5GB or 500MB."
            ) from error

    def write(
        self, model: Path, scale: float, sources: Sequence[Mapping[str, Any]], console: Console
    ) -> None:
        """Write its weights below the new folder `model`; one tensor is in memory at a time."""
        folder = model / self._inside
        metadata = {"format": "pt", METADATA_KEY: json.dumps({"merged": sources}, sort_keys=True)}
        own = {new: old for old, new in self._written.items()}
        named = str(self._inside) if self._inside.name else "transformer"
        files = self._split.filename_to_tensors
        for file, names in track(
            files.items(), f"merging {named}", console=console, transient=True
        ):
            chosen = {name: self._stored[own[name]] for name in names}
            write_stream(folder / file, chosen, lambda new: self._merged(own[new], scale), metadata)
        if self._split.is_sharded:
            where = dict(sorted(self._split.tensor_to_filename.items()))
            write_json(folder / INDEX, {"metadata": self._split.metadata, "weight_map": where})
        fsync_folder(folder)

    def _merged(self, name: str, scale: float) -> torch.Tensor:
        """One weight with its LoRAs added, in the dtype that it has."""
        weight = self._stored[name]
        if name not in self._loras:
            return weight
        total = weight
        for lora, changed in self._loras[name]:
            total = lora.added_to(changed, total, scale, dtype=weight.dtype)
        return total.to(weight.dtype)


def _take_along(
    source: Path, target: Path, left_out: Sequence[Path], merged: Sequence[Path]
) -> None:
    """Everything of a model's folder but hidden files, `left_out` and the weights of `merged`."""
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry in left_out:
            continue
        if entry.is_dir():
            (target / entry.name).mkdir()
            _take_along(entry, target / entry.name, left_out, merged)
        elif (
            source in merged
            and entry.name.endswith((".safetensors", ".safetensors.index.json"))
            and entry.name not in COMPONENT_NAMES
        ):
            continue
        elif entry.suffix in WEIGHTS:
            link(entry.resolve(), target / entry.name)  # in the hub's cache it is a symlink
        else:
            shutil.copyfile(entry, target / entry.name)
    fsync_folder(target)


def _write_single_expert(folder: Path) -> None:
    """Tell diffusers that one transformer runs all steps."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    write_json(path, index | {"transformer_2": [None, None], "boundary_ratio": None})
