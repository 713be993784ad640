"""The weights of a component: read, understood or refused, and put into its model.

Every command loads every component this way, whatever the layout. diffusers and transformers leave
out tensors that a model has no place for, and fill those that a file lacks with random numbers, and
only warn. Here names and shapes must be the model's, one for one, once scales of fp8 are multiplied
in, wrappers before the names taken off, and what has no part (`shared.models.tensor_names`) left
out.

Files are read with safetensors or `torch.load(weights_only=True)`: nothing that they say is run.
Classes are those of the model's family, imported when a network is built.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from shared.errors import UserError, first_line
from shared.models import fp8, original_weights
from shared.models.family import Family
from shared.models.original_layout import is_original, read_json, transformer_config
from shared.models.tensor_names import is_adapter, kind_of, never_weights, unwrapped
from shared.models.weight_files import OF_TRANSFORMERS, weight_files

State = dict[str, torch.Tensor]
AGAIN = "It is damaged, or of another model: download it again."
_ONE_SET = "Leave one set of weights in the folder."
_TIED, _TIED_TO = "encoder.embed_tokens.", "shared."
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the files of a component hold, by diffusers' or transformers' names.

    Tensors lie where the files are mapped until they are asked for.
    """

    component: str
    source: Path
    """The file, or the folder of several; what messages name."""
    stored: Mapping[str, torch.Tensor]
    """By the files' names, without wrappers."""
    scales: Mapping[str, torch.Tensor]
    """Of fp8 weights, by the files' names."""
    names: Mapping[str, str]
    """Name by diffusers or transformers → name in the file."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def is_fp8(self, name: str) -> bool:
        """Whether a weight is stored in 8 bits."""
        return self.stored[self.names[name]].dtype.itemsize == 1

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight; none is read."""
        return {
            name: tuple(original_weights.part(self.component, name, old, self.stored[old]).shape)
            for name, old in self.names.items()
        }

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A weight with its scale multiplied in: in `dtype`, or as it is stored (fp8: in fp32)."""
        old = self.names[name]
        tensor = fp8.plain(self.stored[old], self.scales.get(old), dtype)
        return original_weights.part(self.component, name, old, tensor)


def model_weights(folder: Path, component: str) -> Weights:
    """The weights of a component of a model folder, in either layout.

    Raises UserError naming a file that is missing, damaged, or would need pickle, and tensors that
    could not be understood whatever the model.
    """
    files = weight_files(folder, component)
    if not files:
        raise UserError(
            f"model: {folder} lacks the weights of its {component}. Download the whole folder."
        )
    # The folder by its name: of a sharded component it says more than one of the files.
    return weights_of(component, files, files[0] if len(files) == 1 else files[0].parent)


def weights_of(
    component: str, files: Sequence[Path], source: Path, *, cure_twice: str = _ONE_SET
) -> Weights:
    """The weights in these files, which are of one set. Raises UserError as `model_weights`."""
    state: State = {}
    for file in files:
        tensors = read_tensors(file)
        if twice := sorted(state.keys() & tensors.keys()):
            raise UserError(
                f"model: {file.parent} has {twice[0]} twice, in {file.name} too: its files are "
                f"variants of one another. {cure_twice}"
            )
        state |= tensors
    state = unwrapped(component, state)
    if never := never_weights(state):
        if len(never) == len(state) and not is_adapter(never[0]):
            raise UserError(
                f"model: {source} holds nothing but an average of weights (EMA), the first "
                f"{never[0]}. Get the weights themselves, or write these under the model's names."
            )
        raise _too_many(never, source, AGAIN)
    if component == "text_encoder":
        state = _without_tied(state, source)
    stored, scales = fp8.split(state, source)
    names = original_weights.names_of(component, stored)
    used = Counter(names.values())
    if twice := sorted(n for n in stored if used[n] < original_weights.parts(component, n)):
        raise _too_many(twice, source, f"They are there under other names, too. {_ONE_SET}")
    return Weights(component=component, source=source, stored=stored, scales=scales, names=names)


def read_tensors(file: Path) -> State:
    """All tensors of one file, memory-mapped where it allows it. UserError where it is damaged."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by an old torch: cannot be mapped, but read
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(
            isinstance(tensor, torch.Tensor) for tensor in state.values()
        ):
            raise ValueError("it holds something else than tensors by name")
        return state
    except Exception as error:  # OSError, SafetensorError, pickle.UnpicklingError, EOFError …
        unsafe = "weights_only" in str(error).lower() or "weights only" in str(error).lower()
        why = (
            "it is not a plain dictionary of tensors, and wandistill runs no code of a file"
            if unsafe
            else first_line(error)
        )
        raise UserError(f"model: cannot read {file} ({why}). Download it again.") from error


def _without_tied(state: State, source: Path) -> State:
    """UMT5's embedding once: published files have it under two names."""
    result = {name: tensor for name, tensor in state.items() if not name.startswith(_TIED)}
    once = f"{_TIED_TO}weight" not in result
    for name in state.keys() - result.keys():
        twin = _TIED_TO + name.removeprefix(_TIED)
        if not once and not _equal(state[name], result.get(twin)):
            raise UserError(
                f"model: {source} has two embeddings that differ, {twin} and {name}; the text "
                "encoder has one. It is damaged: download it again."
            )
        result[twin] = state[name] if once else result[twin]
    return result


def _equal(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.dtype.itemsize == 1:  # fp8 has no `equal`
        one, other = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    return torch.equal(one, other)


# Into a model


def load_component(family: Family, folder: Path, component: str, *, dtype: torch.dtype) -> Any:
    """One of a model's networks in `dtype`. Raises UserError.

    Of a transformer norms, modulation and time embedding are fp32, as
    `from_pretrained(torch_dtype=dtype)` has them.
    """
    weights = model_weights(folder, component)
    kind, config = family.load_class(component), config_of(folder, component, weights)
    if component in OF_TRANSFORMERS:
        return _of_transformers(kind, config, weights, dtype)
    return filled(empty_model(kind, config), weights, dtype=dtype, cure=AGAIN)


def check_component(family: Family, folder: Path, component: str) -> None:
    """UserError where it could not be loaded from the folder, judged by names and shapes.

    A component whose weights are not there passes.
    """
    if not weight_files(folder, component):
        return
    weights = model_weights(folder, component)
    config = config_of(folder, component, weights)
    check_fits(_empty(family.load_class(component), config, weights.source), weights, AGAIN)


def config_of(folder: Path, component: str, weights: Weights) -> dict[str, Any]:
    """A component's config: the file, or what the original layout's weights tell."""
    if not is_original(folder):
        return read_json(folder / component / "config.json", "model")
    if component in ("transformer", "transformer_2"):
        return transformer_config(folder, component)
    return original_weights.config_of(folder, component, weights.shapes, weights.source)


def empty_model(kind: Any, config: dict[str, Any]) -> Any:
    """A `kind` of diffusers or transformers that has names and shapes, and no values."""
    from accelerate import init_empty_weights

    with init_empty_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(kind, "from_config"):
            return kind.from_config(config)
        # A whole CLIP's config holds that of its vision half.
        return kind(kind.config_class.from_dict(config.get("vision_config", config)))


def check_fits(model: Any, weights: Weights, cure: str) -> None:
    """UserError unless the weights are those of the model, one for one."""
    expected = {_plainly(name): tensor.shape for name, tensor in model.state_dict().items()}
    found = dict(weights.shapes)
    for pattern in model._keys_to_ignore_on_load_unexpected or ():
        # A whole part of the name: diffusers searches for the pattern anywhere in it.
        part = re.compile(rf"(^|\.)({pattern})(\.|$)")
        found = {name: s for name, s in found.items() if not part.search(name)}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        in_file = [weights.names[name] for name in unexpected]
        raise _too_many(in_file, weights.source, cure, missing)
    if missing:
        raise UserError(f"model: {weights.source} lacks {_lacking(missing)}. {cure}")
    for name, shape in expected.items():
        if found[name] != tuple(shape):
            raise UserError(
                f"model: {weights.source}: {name} has shape {list(found[name])}, expected "
                f"{list(shape)} by the config. {cure}"
            )


def filled(model: Any, weights: Weights, *, dtype: torch.dtype, cure: str) -> Any:
    """A model of diffusers, empty so far, with these weights. Raises UserError.

    Modules that its class keeps in fp32 are fp32.
    """
    check_fits(model, weights, cure)
    kept = set(model._keep_in_fp32_modules or ())
    state = {
        name: weights.plain(name, torch.float32 if kept & set(name.split(".")) else dtype)
        for name in model.state_dict()
    }
    model.load_state_dict(state, assign=True, strict=True)
    return model.eval()


def _of_transformers(
    kind: Any, config: dict[str, Any], weights: Weights, dtype: torch.dtype
) -> Any:
    empty = _empty(kind, config, weights.source)
    check_fits(empty, weights, AGAIN)
    # What is no fp8 the library brings to its dtype itself, and knows what to keep in fp32.
    state = {
        name: weights.plain(own, dtype if weights.is_fp8(own) else None)
        for name in empty.state_dict()
        if (own := _plainly(name)) in weights and not name.startswith(_TIED)
    }
    try:
        model, report = kind.from_pretrained(
            None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # RuntimeError, KeyError, ValueError
        raise UserError(
            f"model: cannot load {weights.component} from {weights.source} "
            f"({first_line(error)}). {AGAIN}"
        ) from error
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[keys], (keys, report[keys])  # as was checked
    return model


def _empty(kind: Any, config: dict[str, Any], source: Path) -> Any:
    """`empty_model`. UserError where the config makes none."""
    try:
        return empty_model(kind, config)
    except Exception as error:  # TypeError, ValueError, KeyError: whatever a config may be
        raise UserError(
            f"model: the config of {source} makes no {kind.__name__} ({first_line(error)}). {AGAIN}"
        ) from error


def _plainly(name: str) -> str:
    """A model's own name as `Weights` has it."""
    if name.startswith(_TIED):
        return _TIED_TO + name.removeprefix(_TIED)
    return name.removeprefix("vision_model.")


def _lacking(names: Sequence[str]) -> str:
    return f"{len(names)} weights, the first {names[0]}"


def _too_many(
    names: Sequence[str], source: Path, cure: str, missing: Sequence[str] = ()
) -> UserError:
    lacks = f"lacks {_lacking(missing)}, and " if missing else ""
    found = f"{lacks}has {len(names)} weights too many, the first {', '.join(names[:_SHOWN])}"
    if known := kind_of(names):
        what, cure = known
        found += f": {what}"
    return UserError(f"model: {source} {found}. {cure}")
