"""LoRA files in the forms that others load: of a run that ends, a checkpoint, another file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.errors import UserError
from shared.io.durable import write_bytes
from train.model.lora_files import PEFT_METADATA_KEY, Form, LoraWeights, read_lora
from train.options import Expert
from train.saving.checkpoint import read_lora_of_checkpoint
from train.saving.lora_formats import FORMS, to_form
from train.saving.provenance import Provenance
from train.saving.safetensors_io import safetensors_parts


def lora_path(folder: Path, expert: Expert, form: Form) -> Path:
    """Where the final LoRA of an expert lies."""
    return folder / f"lora-{expert}-{form}.safetensors"


def write_loras(folder: Path, lora: LoraWeights, provenance: Provenance) -> list[Path]:
    """Write an expert's LoRA in every form, in the dtype that it has; the paths written."""
    paths = []
    for form in FORMS:
        paths.append(lora_path(folder, provenance.expert, form))
        write_lora(paths[-1], lora, form, provenance.metadata())
    return paths


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


def from_file(path: Path) -> Source:
    """A LoRA file of any form, with what it says about its training. UserError as `read_lora`."""
    read = read_lora(path)
    of_form = ("format", PEFT_METADATA_KEY)
    metadata = {name: text for name, text in read.metadata.items() if name not in of_form}
    return Source(read.lora, metadata, read.note)


def from_checkpoint(path: Path) -> Source:
    """The LoRA that a checkpoint's run is for, in fp32, with the metadata of the run's own files.

    UserError when there is no checkpoint, or a damaged one.
    """
    weights, lora = read_lora_of_checkpoint(path)
    provenance = Provenance.of({**lora["provenance"], "updates": lora["updates"]})
    return Source(LoraWeights.uniform(weights, provenance.alpha), provenance.metadata())


def export(source: Source, form: Form, output: Path, dtype: torch.dtype | None) -> None:
    """Write an adapter in a form; `dtype` None keeps the numbers as they are."""
    if output.suffix != ".safetensors" or output.is_dir():
        raise UserError(
            f"--output: found {output}, expected a file whose name ends in .safetensors, such as "
            f"lora-low-{form}.safetensors."
        )
    try:
        write_lora(
            output, source.lora if dtype is None else source.lora.to(dtype), form, source.metadata
        )
    except OSError as error:
        raise UserError(
            f"--output: can't write {output} ({error.strerror}). Choose another folder."
        ) from error
