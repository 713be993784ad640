"""Which component of a model this is: a digest of its weights and of what its config decides.

The same weights have the same digest in diffusers' and in Wan's original layout, in one file or cut
into several, as bf16 or written out in fp32: none of that changes what an encoder computes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.io.hashing import FileHasher, digest_of
from shared.models import original_layout, original_weights
from shared.models.original_layout import read_json
from shared.models.spec import FAMILIES
from shared.models.wan import WAN
from shared.models.weight_files import weight_files
from shared.models.weights import config_of, model_weights

# Raise when a digest of the same weights becomes another: it is part of the memo's names.
_VERSION = 2
_FIRST = 1
"""That of `first_digest`."""
_CHUNK = 1 << 22  # values
# What of a config decides outputs beside the shapes of the weights, with the classes' defaults. By
# the class that the config is of; of any other class every field counts.
_CLASSES = json.loads(Path(__file__).with_name("class_defaults.json").read_text())
_DECIDING: Mapping[str, Mapping[str, Any]] = {
    **{family.classes["vae"][1]: family.vae_fields for family in FAMILIES},
    "umt5": _CLASSES["umt5"],
    "clip_vision_model": _CLASSES["clip_vision_model"],
}
# Of Wan's original layout, which has no configs.
_CLASS = {
    "vae": WAN.classes["vae"][1],
    "text_encoder": "umt5",
    "image_encoder": "clip_vision_model",
}
# CLIPImageProcessor's own defaults.
_PROCESSOR: Mapping[str, Any] = _CLASSES["CLIPImageProcessor"]


def component_digest(
    model: Path,
    component: str,
    hasher: FileHasher,
    check: Callable[[str], None] = lambda component: None,
) -> str | None:
    """Digest of a component of the model in a folder; None where its weights are not there.

    Of the values that it is loaded with: scales of fp8 are multiplied in. Remembered by the files'
    stamps; `check` is called with the component before weights are read that
    are not remembered. Raises UserError for weights that can't be read or understood.
    """
    original = original_layout.is_original(model)
    if component == "tokenizer":
        return _tokenizer_digest(model, original, hasher)
    files = weight_files(model, component)
    if not files:
        return None
    remembered = digest_of([_VERSION, component, *(hasher.name(file) for file in files)])
    # The original layout's configs follow from the weights, so one memo holds both.
    config = {} if original else _config(model / component)
    remembered = digest_of([remembered, config])
    digest = hasher.known(remembered)
    if digest is None:
        check(component)
        weights = model_weights(model, component)
        if original:
            config = _deciding(config_of(model, component, weights), _CLASS[component])
        digest = digest_of([_values((name, weights.plain(name)) for name in weights), config])
        hasher.remember(remembered, digest)
    return digest


def first_digest(model: Path, component: str, hasher: FileHasher) -> str | None:
    """What the digest of a component in diffusers' layout once was: of every file and tensor there.

    Caches have it. It is another than today's where there is more than is loaded: a `.bin` or a
    variant beside the weights, the text half of a CLIP. None in Wan's layout and without weights.
    """
    if original_layout.is_original(model):
        return None
    endings = {".safetensors", ".bin", ".pth", ".model"}
    files = [f for f in sorted((model / component).glob("*")) if f.suffix in endings]
    if not files:
        return None
    config = _config(model / component)
    remembered = digest_of([_FIRST, component, *(hasher.name(file) for file in files)])
    remembered = digest_of([remembered, config])
    digest = hasher.known(remembered)
    if digest is None:
        try:
            values = digest_of(sorted(_first_values(files).items()))
        except (SafetensorError, OSError):
            values = hasher.combined(files)
        digest = digest_of([values, config])
        hasher.remember(remembered, digest)
    return digest


def _first_values(files: list[Path]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - it is no dictionary
                name = stored.removeprefix("vision_model.")
                if not name.endswith("position_ids"):
                    name = "shared.weight" if name == "encoder.embed_tokens.weight" else name
                    digests[name] = _value_digest(tensors.get_tensor(stored))
    return digests


def _tokenizer_digest(model: Path, original: bool, hasher: FileHasher) -> str | None:
    if original:
        files = original_layout.original_files(model, "tokenizer")
    else:
        files = [file for file in sorted((model / "tokenizer").glob("*")) if file.is_file()]
    vocabulary = [f for f in files if f.suffix in {".safetensors", ".bin", ".pth", ".model"}]
    vocabulary = vocabulary or [file for file in files if file.name == "tokenizer.json"]
    return hasher.combined(vocabulary) if vocabulary else None


def processor_digest(model: Path) -> str | None:
    """Digest of what the image processor of a folder does; None where there is none."""
    if original_layout.is_original(model):
        if not weight_files(model, "image_encoder"):
            return None
        config = config_of(model, "image_encoder", model_weights(model, "image_encoder"))
        found = original_weights.processor_config(config["image_size"])
    else:
        path = model / "image_processor" / "preprocessor_config.json"
        if not path.exists():
            return None
        found = read_json(path, "model")
    return digest_of({name: found.get(name, default) for name, default in _PROCESSOR.items()})


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path, "model") if path.exists() else {}
    kind = str(config.get("_class_name") or config.get("model_type"))
    if kind in _DECIDING:
        return _deciding(config, kind)
    bookkeeping = ("transformers_version",)
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in bookkeeping}


def _deciding(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {name: config.get(name, default) for name, default in _DECIDING[kind].items()}


def _values(tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    """One digest of all tensors' names, shapes and values."""
    return digest_of(sorted((name, _value_digest(tensor)) for name, tensor in tensors))


def _value_digest(tensor: torch.Tensor) -> str:
    running = hashlib.sha256(repr(list(tensor.shape)).encode())
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        narrow = _narrowest(chunk).contiguous()
        running.update(str(narrow.dtype).encode())
        running.update(narrow.view(torch.uint8).numpy())
    return running.hexdigest()


def _narrowest(values: torch.Tensor) -> torch.Tensor:
    """The same values as bf16 or fp16 if either holds them exactly, else fp32."""
    if not values.is_floating_point() or values.dtype == torch.bfloat16:
        return values
    wide = values.float()
    for dtype in (torch.bfloat16, torch.float16):
        narrow = wide.to(dtype)
        if torch.equal(narrow.float(), wide):
            return narrow
    return wide
