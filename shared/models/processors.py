"""What stands before a model's encoders: tokenizer and image processor, in either layout."""

from importlib import import_module
from pathlib import Path
from typing import Any

from shared.errors import UserError, first_line
from shared.models.original_layout import TOKENIZER, is_original, read_json
from shared.models.original_weights import processor_config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer by the class that `model_index.json` names, as the pipelines load it.

    Raises UserError.
    """
    transformers = import_module("transformers")  # which `shared` itself never needs
    if is_original(folder):
        return _load(transformers.AutoTokenizer, folder / TOKENIZER)
    named = read_json(folder / "model_index.json", "model").get("tokenizer")
    name = named[1] if isinstance(named, list) and len(named) > 1 else None
    tokenizer = getattr(transformers, str(name), None)
    if tokenizer is None:
        raise UserError(
            f"model: {folder / 'model_index.json'} names the tokenizer {name!r}, which "
            f"transformers {transformers.__version__} does not have; expected T5TokenizerFast."
        )
    return _load(tokenizer, folder / "tokenizer")


def load_image_processor(kind: Any, folder: Path, image_size: int) -> Any:
    """Wan 2.1's, as a `kind`, for a CLIP of this size. Raises UserError."""
    if is_original(folder):
        return kind(**processor_config(image_size))
    return _load(kind, folder / "image_processor")


def _load(kind: Any, folder: Path) -> Any:
    """`kind.from_pretrained(folder)`; every way in which that fails becomes a UserError."""
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError …
        raise UserError(
            f"model: cannot load {folder.name} from {folder} ({first_line(error)}). "
            "Its files are damaged or incomplete: download them again."
        ) from error
