"""Which files of a model folder hold a component's weights, in either layout.

As diffusers and transformers choose them: those that an index names, or else the one file of the
usual name, and variants (`model.fp16.safetensors`) never. Where they would choose in silence, a
folder is refused: two sets of weights, a file beside the weights that nobody would read.
"""

from pathlib import Path

from shared.errors import UserError, first_line
from shared.models.original_layout import (
    COMPONENT_NAMES,
    expert_folder,
    is_original,
    original_files,
    read_json,
)

INDEX = ".safetensors.index.json"
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
OF_TRANSFORMERS = ("text_encoder", "image_encoder")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that run code when they are read."""
_PICKLED_NAME = {DIFFUSERS: DIFFUSERS, TRANSFORMERS: "pytorch_model"}


def weight_files(model: Path, component: str) -> list[Path]:
    """The files that a component is loaded from, in order; none where its weights are not there.

    Raises UserError naming files that contradict one another, and such as would be left out.
    """
    if not is_original(model):
        name = TRANSFORMERS if component in OF_TRANSFORMERS else DIFFUSERS
        pickled = component not in ("transformer", "transformer_2")
        return chosen(model / component, name, pickled=pickled)
    if component in ("transformer", "transformer_2"):
        return chosen(expert_folder(model, component), DIFFUSERS)
    files = original_files(model, component)
    if len(files) > 1:
        raise UserError(
            f"model: {files[0]} and {files[1].name} both are the {component}. Leave one of them in "
            "the folder."
        )
    return files


def chosen(folder: Path, name: str, *, pickled: bool = False, what: str = "model") -> list[Path]:
    """The files of one set of weights, called `name`, in a folder.

    `pickled`: `.bin` files are taken where there are no safetensors. `what` begins the messages.
    Raises UserError.
    """
    files = _chosen(folder, name, "safetensors", what)
    if files or not pickled:
        return files
    return _chosen(folder, _PICKLED_NAME[name], "bin", what)


def _chosen(folder: Path, name: str, ending: str, what: str) -> list[Path]:
    there = sorted(
        file
        for file in folder.glob(f"*.{ending}")
        if file.is_file() and file.name not in COMPONENT_NAMES
    )
    whole, index = folder / f"{name}.{ending}", folder / f"{name}.{ending}.index.json"
    if whole in there and index.is_file():
        raise UserError(
            f"{what}: {folder} holds weights twice, in {whole.name} and in the files of "
            f"{index.name}. Leave one of the two in the folder."
        )
    if index.is_file():
        if not there and not any(file.is_file() for file in _indexed(index, what)):
            return []  # only JSON was downloaded, as on a machine that trains
        files = indexed(index, what)
    elif whole in there:
        files = [whole]
    else:
        return there
    there = sorted({*there, *folder.glob("adapter_model.*")})  # of peft, in whatever form
    stray = [f for f in there if f not in files and not f.name.startswith(f"{name}.")]
    if stray:
        weights = (index if index.is_file() else whole).name
        raise UserError(
            f"{what}: {stray[0]} does not belong to the weights of {weights}: it would be ignored"
            f"{f', like {len(stray) - 1} more files' if len(stray) > 1 else ''}. Move it "
            "elsewhere. If it is an adapter (a LoRA), merge it into the weights first."
            + ("" if what == "model" else f" Or give the file itself: {what} FILE.")
        )
    return files


def indexed(index: Path, what: str) -> list[Path]:
    """The files that an index names. UserError, begun with `what`, where one is missing."""
    files = _indexed(index, what)
    if lost := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{what}: {index} names {', '.join(lost)}, which is not in its folder. Download the "
            "folder again."
        )
    return files


def _indexed(index: Path, what: str) -> list[Path]:
    """The files that an index names, there or not."""
    try:
        names = {str(name) for name in read_json(index, what)["weight_map"].values()}
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{what}: {index} is damaged ({first_line(error)}). Get it again."
        ) from error
    if not names or any("/" in name for name in names):
        raise UserError(f"{what}: {index} names no files of its folder. Get it again.")
    return sorted(index.parent / name for name in names)
