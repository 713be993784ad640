"""What a model family is to both stages: facts, and classes by their names. Nothing is imported.

A new family is one file like `shared.models.wan`, listed in `shared.models.spec.FAMILIES`. Its
transformer is one of diffusers' kind: blocks in one list, called with `hidden_states`, `timestep`
and `encoder_hidden_states`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

Mode = Literal["t2v", "i2v", "ti2v", "flf2v"]
TrainMode = Literal["normal", "i2v", "ti2v", "flf2v"]
"""What --train-mode calls them: the first is VideoX-Fun's name of t2v."""
Lines = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes that a block takes, as factors that were measured; by precision ("bf16", "no").

    For N tokens of width D, M of text, and feed-forward layers of inner width F.
    """

    kept: Mapping[str, tuple[float, float, float, float]]
    """What autograd keeps, for each of N·D, N·F, M·D, and N·rank."""
    kept_of_time: float
    """For each of N·D more, where every token has a time of its own (ti2v)."""
    backward: Mapping[str, Lines]
    """Most that lives while a checkpointed block is computed again and differentiated, for each of
    N·D and N·F. Moments that compete: in its attention, in its feed-forward layers."""
    backward_of_time: Mapping[str, float]
    forward: Mapping[str, Lines]
    """The same of a pass without gradients."""
    forward_with_time: Mapping[str, Lines]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts that the models of a family share, whatever their size; see `shared.models.wan`."""

    classes: Mapping[str, tuple[str, str]]
    """Component of a diffusers folder, "pipeline" or "image_pipeline" → (module, class)."""

    # Text, latents, noise
    text_tokens: int
    """Of each caption: longer ones are cut, shorter ones filled up with zeros."""
    negative_prompt: str
    stride: tuple[int, int, int]
    """Of the VAE, (time, height, width), where its config says none."""
    mask_channels: int
    """Of the transformer's input, before the condition: 1 where a frame is given."""
    given_frames: Mapping[Mode, tuple[int, ...]]
    """Mode → the frames of a clip that lie in its condition, beside the latents; of modes without
    a condition nothing."""
    vae_fields: Mapping[str, Any]
    """Fields of the VAE's config that decide its outputs, beside the shapes of its weights, with
    the class's defaults."""
    frames_per_second: int
    flow_shift: float
    """To train with."""
    other_flow_shifts: Mapping[tuple[Mode, bool], float]
    """(mode, whether there are two experts) → shift, where it is another."""

    # The transformer, by the names of its class
    blocks: str
    """The list of blocks."""
    patch_embedding: str
    """The layer that the latents enter by; it has the dtype of the base."""
    rotary: str
    """What makes the tables of rotary embeddings."""
    outside_autocast: tuple[str, ...]
    """Endings of the modules that compute in their weights' own dtype."""
    names_begin: str
    """Of some weight in files of this class, and of none in other layouts."""
    original_blocks: str
    """The list of blocks in the original code, whose names ComfyUI and kohya have."""
    lora_layers: Mapping[str, str]
    """Linear layers of a block: original name → the class's name."""
    memory: BlockMemory
    other_names: Mapping[str, str] = field(default_factory=dict)
    """What else weights belong to: original name → the class's; `*` is the number of a block."""
    bare_weights: frozenset[str] = frozenset()
    """Those of `other_names`, by the class, that are weights themselves and no layers."""

    @cached_property
    def names(self) -> dict[str, str]:
        """All that has weights: original name → the class's; `*` is the number of a block."""
        layers = self.lora_layers.items()
        return {
            **{f"{self.original_blocks}.*.{old}": f"{self.blocks}.*.{own}" for old, own in layers},
            **self.other_names,
        }

    @cached_property
    def original_names(self) -> dict[str, str]:
        """`names` the other way round."""
        return {own: original for original, own in self.names.items()}

    def original(self, name: str) -> str:
        """The original name of what the class calls so. KeyError where it has nothing so called."""
        starred, number = star_block(name, self.blocks)
        return self.original_names[starred].replace("*", number)

    @cached_property
    def original_layers(self) -> dict[str, str]:
        """Linear layers of a block: the class's name → original name."""
        return {own: original for original, own in self.lora_layers.items()}

    def has_layer(self, module: str) -> bool:
        """Whether this is the whole name of a linear layer in a block."""
        blocks, _, inside = star_block(module, self.blocks)[0].partition(".*.")
        return blocks == self.blocks and inside in self.original_layers

    def has(self, module: str) -> bool:
        """Whether something with weights has this whole name."""
        return star_block(module, self.blocks)[0] in self.original_names

    def load_class(self, part: str) -> Any:
        """One of `classes`, imported now: for the stage that builds it."""
        module, name = self.classes[part]
        return getattr(import_module(module), name)

    def is_of(self, model: Any) -> bool:
        """Whether a transformer is one of this family, or one of its classes made over."""
        return self.classes["transformer"][1] in (kind.__name__ for kind in type(model).__mro__)


def split_layer(module: str) -> tuple[str, int, str]:
    """`blocks.0.attn1.to_q` → (`blocks`, 0, `attn1.to_q`), of whatever family."""
    blocks, number, inside = re.split(r"\.(\d+)\.", module, maxsplit=1)
    return blocks, int(number), inside


def star_block(name: str, blocks: str) -> tuple[str, str]:
    """`blocks.0.attn1.to_q` → (`blocks.*.attn1.to_q`, "0"); outside of blocks the name and ""."""
    match = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)((?:\..+)?)", name)
    return (f"{blocks}.*{match[2]}", match[1]) if match else (name, "")
