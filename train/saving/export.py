"""LoRA files in the forms that others load: of a run that ends, a checkpoint, another file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.errors import UserError
from shared.io.durable import write_bytes
from train.model.lora_files import LoraWeights, read_lora
from train.model.lora_names import Form
from train.model.peft_config import PEFT_METADATA_KEY
from train.options import Expert
from train.saving.checkpoint import read_lora_of_checkpoint
from train.saving.lora_formats import FORMS, to_form
from train.saving.provenance import METADATA_KEY, Provenance
from train.saving.safetensors_io import safetensors_parts


def lora_path(folder: Path, expert: Expert, form: Form) -> Path:
    """Where the final LoRA of an expert lies."""
    return folder / f"lora-{expert}-{form}.safetensors"


def write_loras(folder: Path, lora: LoraWeights, provenance: Provenance) -> list[Path]:
    """Write an expert's LoRA in every form, in the dtype that it has; the paths written."""
    return _in_every_form(folder, provenance.expert, lora, provenance.metadata())


def _in_every_form(
    folder: Path, expert: Expert, lora: LoraWeights, metadata: Mapping[str, str]
) -> list[Path]:
    paths = {form: lora_path(folder, expert, form) for form in FORMS}
    for form, path in paths.items():
        write_lora(path, lora, form, metadata)
    return list(paths.values())


def write_lora(path: Path, lora: LoraWeights, form: Form, metadata: Mapping[str, str]) -> None:
    """Write one file. `metadata`: what does not depend on the form."""
    tensors, needed = to_form(lora, form)
    write_bytes(path, *safetensors_parts(tensors, {"format": "pt", **metadata, **needed}))


@dataclass(frozen=True)
class Source:
    """An adapter to be written in another form."""

    lora: LoraWeights
    metadata: Mapping[str, str]
    """What does not depend on the form."""
    note: str | None = None
    """What to print about it."""


def from_file(path: Path, alpha: float | None = None) -> Source:
    """A LoRA of any form, with what it says about its training. UserError as `read_lora`.

    `alpha`: of every pair, in place of the file's; the matrices stay.
    """
    read = read_lora(path, alpha)
    of_form = ("format", PEFT_METADATA_KEY)
    metadata = {name: text for name, text in read.metadata.items() if name not in of_form}
    return Source(read.lora, _with_alpha(metadata, alpha), read.note)


def from_checkpoint(path: Path, alpha: float | None = None) -> Source:
    """The LoRA that a checkpoint's run is for, in fp32, with the metadata of the run's own files.

    UserError when there is no checkpoint, a damaged one, or one of a run that diverged.
    """
    weights, lora = read_lora_of_checkpoint(path)
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"--checkpoint: {path} has values that are NaN or infinite in {bad[0]}: the run "
            "diverged. Take an earlier checkpoint."
        )
    provenance = Provenance.of({**lora["provenance"], "updates": lora["updates"]})
    weights_of = LoraWeights.uniform(weights, provenance.alpha if alpha is None else alpha)
    return Source(weights_of, _with_alpha(provenance.metadata(), alpha))


def write_loras_of(
    checkpoint: Path, folder: Path, expert: Expert, dtype: torch.dtype
) -> list[Path]:
    """Write the LoRA of a checkpoint in every form, as its run would; the paths written."""
    source = from_checkpoint(checkpoint)
    return _in_every_form(folder, expert, source.lora.to(dtype), source.metadata)


def _with_alpha(metadata: Mapping[str, str], alpha: float | None) -> dict[str, str]:
    """Metadata that says the alpha of the file, where it says one."""
    if alpha is None:
        return dict(metadata)
    changed = {"ss_network_alpha": f"{alpha:g}"}
    if METADATA_KEY in metadata:
        changed[METADATA_KEY] = json.dumps(
            json.loads(metadata[METADATA_KEY]) | {"alpha": alpha}, sort_keys=True
        )
    return {name: changed.get(name, text) for name, text in metadata.items()}


def export(
    source: Source,
    form: Form,
    output: Path,
    dtype: torch.dtype | None,
    *,
    drop_extras: bool = False,
) -> None:
    """Write an adapter in a form; `dtype` None keeps the numbers as they are.

    UserError where the form has no place for weights beside the pairs, unless they are dropped.
    """
    if output.suffix != ".safetensors" or output.is_dir():
        raise UserError(
            f"--output: found {output}, expected a file whose name ends in .safetensors, such as "
            f"lora-low-{form}.safetensors."
        )
    lora = source.lora.without_extras() if drop_extras else source.lora
    if lora.diffs and form != "comfyui":
        shown = ", ".join(sorted(lora.diffs)[:3]) + ", …" * (len(lora.diffs) > 3)
        raise UserError(
            f"--to: found {form}, which has no place for the {len(lora.diffs)} differences of "
            f"whole weights in this LoRA ({shown}). Choose --to comfyui, leave them out with "
            "--drop-extras, or merge the LoRA: wantrain merge"
        )
    try:
        write_lora(output, lora if dtype is None else lora.to(dtype), form, source.metadata)
    except OSError as error:
        raise UserError(
            f"--output: can't write {output} ({error.strerror}). Choose another folder."
        ) from error
