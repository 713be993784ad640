"""Names and configs of Wan's original layout in diffusers' and transformers' terms.

The conversion of transformer and VAE is diffusers' own; UMT5, CLIP and the Wan 2.2 VAE's residual
blocks, which it does not know, are mapped here. Names by diffusers are left as they are, so that
every component, in whatever layout, goes through the same functions.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError, first_line
from shared.models.original_layout import vae_config
from shared.models.spec import FAMILIES
from shared.models.tensor_names import unwrapped

Shapes = Mapping[str, Sequence[int]]
CLIP_HEADS = 16  # of ViT-H/14, in the original code; no shape tells


def processor_config(image_size: int) -> dict[str, Any]:
    """diffusers' published settings of Wan 2.1's image processor, for a CLIP of this size."""
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }


def converted(component: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a transformer's, VAE's or UMT5's file holds, of whatever kind, by diffusers' names.

    Wrappers before the names are taken off. Two names that would become one stay as they are.
    """
    state = unwrapped(component, state)
    new = _CONVERSIONS[component]({name: name for name in state})
    lost = state.keys() - set(new.values())
    return {name: state[name] for name in lost} | {name: state[old] for name, old in new.items()}


def names_of(component: str, stored: Iterable[str]) -> dict[str, str]:
    """Name by diffusers or transformers → name in the file, of weights without a wrapper.

    CLIP's q, k and v are one weight in the original file (`part` cuts it), and its
    `vision_model.`, which transformers' versions don't agree on, is left out. Of two names in the
    file that are of one weight, only one is there.
    """
    return _CONVERSIONS[component]({name: name for name in stored})


def parts(component: str, stored: str) -> int:
    """How many weights a tensor of a file is."""
    return 3 if component == "image_encoder" and _CLIP_QKV.fullmatch(stored) else 1


def part(component: str, name: str, stored: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weight `name` of the tensor that a file has under `stored`: a view of it."""
    if component != "image_encoder" or not stored.startswith("visual."):
        return tensor
    if _CLIP_QKV.fullmatch(stored):
        return tensor.chunk(3)["qkv".index(name.rpartition("_proj.")[0][-1])]
    if stored in ("visual.cls_embedding", "visual.pos_embedding"):  # (1, 1, D), (1, tokens, D)
        rows = tensor.squeeze(0)
        return rows.squeeze(0) if stored == "visual.cls_embedding" else rows
    return tensor


def config_of(folder: Path, component: str, shapes: Shapes, source: Path) -> dict[str, Any]:
    """The config that diffusers' layout would have, as far as it decides anything.

    Of VAE, text encoder and image encoder, by the shapes of their weights in `source`. Raises
    UserError where these are of something else.
    """
    try:
        if component == "text_encoder":
            return _umt5_config(shapes)
        if component == "image_encoder":
            return _clip_config(shapes)
        config = vae_config(folder)
        config["base_dim"] = shapes["encoder.conv_in.weight"][0]
        # norm_out is as wide as the decoder's last stage, which is 1 × its base.
        config["decoder_base_dim"] = shapes["decoder.norm_out.gamma"][0]
        return config
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"model: {source} has no weights of a {component} ({first_line(error)}). It is of "
            "another model: download it again."
        ) from error


def _renamed(state: Mapping[str, str], rules: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names by the first rule (pattern, replacement) that matches them whole; the rest as it is."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def name(old: str) -> str:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(old):
                return match.expand(replacement)
        return old

    return {name(old): value for old, value in state.items()}


def _transformer(state: dict[str, str]) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    begin = tuple(family.names_begin for family in FAMILIES)
    if any(name.startswith(begin) for name in state):
        return state  # diffusers' own names, which the conversion would garble
    # Of FLF2V; the conversion leaves it as it is.
    rules = ((r"img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),)
    return _renamed(dict(convert_wan_transformer_to_diffusers(state)), rules)


_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_VAE_22 = [
    rule
    for old, new, sampler in (
        (r"encoder\.downsamples\.(\d+)\.downsamples", r"encoder.down_blocks.\1", "downsampler"),
        (r"decoder\.upsamples\.(\d+)\.upsamples", r"decoder.up_blocks.\1", "upsampler"),
    )
    for rule in (
        *(
            (rf"{old}\.(\d+)\.residual\.{number}\.(\w+)", rf"{new}.resnets.\2.{name}.\3")
            for number, name in _RESIDUAL.items()
        ),
        (rf"{old}\.(\d+)\.shortcut\.(\w+)", rf"{new}.resnets.\2.conv_shortcut.\3"),
        (rf"{old}\.\d+\.((?:resample\.1|time_conv)\.\w+)", rf"{new}.{sampler}.\2"),
    )
]


def _vae(state: dict[str, str]) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    # diffusers converts the Wan 2.1 VAE; the nested blocks of the 2.2 one are ours.
    renamed = _renamed(state, _VAE_22)
    nested = {name: value for name, value in renamed.items() if name not in state}
    rest = {name: value for name, value in state.items() if name in renamed}
    return nested | dict(convert_wan_vae_to_diffusers(rest))


_UMT5_BLOCK = r"blocks\.(\d+)\."
_UMT5 = [
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (_UMT5_BLOCK + r"norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (_UMT5_BLOCK + r"attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        _UMT5_BLOCK + r"pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (_UMT5_BLOCK + r"norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (
        _UMT5_BLOCK + r"ffn\.gate\.0\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    ),
    (_UMT5_BLOCK + r"ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (_UMT5_BLOCK + r"ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
]


def _umt5_config(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    first = "encoder.block.0.layer."
    heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"][1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{first}1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\..*"),
        "feed_forward_proj": "gated-gelu",
    }


_CLIP_LAYER = r"visual\.transformer\.(\d+)\."
_CLIP = [
    (r"visual\.patch_embedding\.weight", "embeddings.patch_embedding.weight"),
    (r"visual\.cls_embedding", "embeddings.class_embedding"),
    (r"visual\.pos_embedding", "embeddings.position_embedding.weight"),
    (r"visual\.pre_norm\.(\w+)", r"pre_layrnorm.\1"),
    (r"visual\.post_norm\.(\w+)", r"post_layernorm.\1"),
    (_CLIP_LAYER + r"norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (_CLIP_LAYER + r"attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (_CLIP_LAYER + r"mlp\.0\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (_CLIP_LAYER + r"mlp\.2\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
]
_CLIP_QKV = re.compile(_CLIP_LAYER + r"attn\.to_qkv\.(\w+)")


def _clip(state: dict[str, str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in state:
        if match := _CLIP_QKV.fullmatch(name):
            layer, kind = match.groups()
            names |= {f"encoder.layers.{layer}.self_attn.{x}_proj.{kind}": name for x in "qkv"}
    rest = {name: name for name in state if not _CLIP_QKV.fullmatch(name)}
    own = {new.removeprefix("vision_model."): old for new, old in _renamed(rest, _CLIP).items()}
    return names | own


def _clip_config(shapes: Shapes) -> dict[str, Any]:
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    tokens = shapes["embeddings.position_embedding.weight"][0]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\..*"),
        "num_attention_heads": CLIP_HEADS,
        "image_size": math.isqrt(tokens - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _count(state: Iterable[str], pattern: str) -> int:
    """Layers by the highest number in the names."""
    numbers = [int(match[1]) for name in state if (match := re.fullmatch(pattern, name))]
    return max(numbers, default=-1) + 1


_CONVERSIONS: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "transformer": _transformer,
    "transformer_2": _transformer,
    "vae": _vae,
    "text_encoder": partial(_renamed, rules=_UMT5),
    "image_encoder": _clip,
}
