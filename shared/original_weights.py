"""Weights in Wan's original layout under diffusers' and transformers' names, and models of them.

Files are read with safetensors or `torch.load(weights_only=True)`: nothing that they say is run.
The conversion of transformer and VAE is diffusers' own; UMT5, CLIP and the Wan 2.2 VAE's residual
blocks, which it does not know, are mapped here. Models are filled strictly: a weight too few, too
many or of another shape is an error. Their classes are the caller's: `shared` builds none.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from shared import fp8
from shared.errors import UserError, first_line
from shared.original_layout import (
    COMFYUI_PREFIXES,
    TOKENIZER,
    component_files,
    expert_folder,
    transformer_config,
    vae_config,
)

State = dict[str, torch.Tensor]
_AGAIN = "It is damaged, or of another model: download it again."
CLIP_HEADS = 16  # of ViT-H/14, in the original code; no shape tells


def load_transformer(kind: Any, folder: Path, component: str, *, dtype: torch.dtype) -> Any:
    """A `kind`, WanTransformer3DModel, as `from_pretrained(torch_dtype=dtype)` gives it.

    diffusers' own `from_single_file` ends in `.to(dtype)`, which would take norms, modulation and
    time embedding out of fp32. Raises UserError.
    """
    config, source = transformer_config(folder, component), expert_folder(folder, component)
    state = read_state(folder, component)
    return transformer_of(kind, config, state, dtype=dtype, source=source, cure=_AGAIN)


def transformer_of(
    kind: Any, config: dict[str, Any], state: State, *, dtype: torch.dtype, source: Path, cure: str
) -> Any:
    """A `kind`, WanTransformer3DModel, of tensors by diffusers' names, which may be fp8.

    `source` is where they are from, `cure` what to do if they don't fit. Raises UserError.
    """
    kept = set(kind._keep_in_fp32_modules)

    def wanted(name: str) -> torch.dtype:
        return torch.float32 if kept & set(name.split(".")) else dtype

    return _filled(empty_model(kind, config), fp8.plain(state, wanted, source), source, cure)


def load_vae(kind: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """A `kind`, AutoencoderKLWan, in `dtype`. Raises UserError."""
    state = read_state(folder, "vae")
    model = empty_model(kind, config_of(folder, "vae", state))
    in_dtype = {name: tensor.to(dtype) for name, tensor in state.items()}
    return _filled(model, in_dtype, component_files(folder, "vae")[0], _AGAIN)


def load_text_encoder(kind: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """A `kind`, UMT5EncoderModel, in `dtype`. Raises UserError."""
    return _transformers_model(kind, folder, "text_encoder", dtype)


def load_image_encoder(kind: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """A `kind`, CLIPVisionModel, in `dtype`. Raises UserError."""
    return _transformers_model(kind, folder, "image_encoder", dtype)


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """The tokenizer in `google/umt5-xxl`, by `kind`, AutoTokenizer. Raises UserError."""
    try:
        return kind.from_pretrained(folder / TOKENIZER)
    except Exception as error:  # OSError, ValueError, KeyError …
        raise UserError(
            f"model: cannot load the tokenizer from {folder / TOKENIZER} ({first_line(error)}). "
            "Its files are damaged or incomplete: download them again."
        ) from error


def processor_config(image_size: int) -> dict[str, Any]:
    """diffusers' published settings of Wan 2.1's image processor, for a CLIP of this size."""
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }


def read_state(folder: Path, component: str) -> State:
    """A component's tensors (memory-mapped where the file allows it) by diffusers' names.

    Raises UserError naming a file that is missing, damaged, or would need pickle.
    """
    files = component_files(folder, component)
    if not files:
        raise UserError(
            f"model: {folder} lacks the weights of its {component}. Download the whole folder."
        )
    state: State = {}
    for file in files:
        state |= read_tensors(file)
    return converted(component, state)


def converted(component: str, state: dict[str, Any]) -> dict[str, Any]:
    """Original names → diffusers' or transformers'; values go along untouched (CLIP's are cut)."""
    return _CONVERSIONS[component](dict(state))


def config_of(folder: Path, component: str, state: State) -> dict[str, Any]:
    """The config that diffusers' layout would have, as far as it decides anything.

    Raises UserError where the weights are of something else.
    """
    try:
        if component == "text_encoder":
            return _umt5_config(state)
        if component == "image_encoder":
            return _clip_config(state)
        config = vae_config(folder)
        config["base_dim"] = state["encoder.conv_in.weight"].shape[0]
        # norm_out is as wide as the decoder's last stage, which is 1 × its base.
        config["decoder_base_dim"] = state["decoder.norm_out.gamma"].shape[0]
        return config
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"model: {component_files(folder, component)[0]} has no weights of a {component} "
            f"({first_line(error)}). It is of another model: download it again."
        ) from error


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


def _transformers_model(kind: Any, folder: Path, component: str, dtype: torch.dtype) -> Any:
    state = read_state(folder, component)
    file = component_files(folder, component)[0]
    try:
        model, report = kind.from_pretrained(
            None,
            config=kind.config_class(**config_of(folder, component, state)),
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # RuntimeError, KeyError, IndexError: shapes that fit no config
        raise UserError(
            f"model: {file} is of another model ({first_line(error)}). Download it again."
        ) from error
    _refuse(sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), file, _AGAIN)
    return model


def empty_model(kind: Any, config: dict[str, Any]) -> Any:
    """A `kind` that has names and shapes, and no values."""
    from accelerate import init_empty_weights

    with init_empty_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_config(config)


def _filled(model: Any, state: State, source: Path, cure: str) -> Any:
    expected = model.state_dict()
    for pattern in model._keys_to_ignore_on_load_unexpected or ():
        state = {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    _refuse(sorted(missing), sorted(unexpected), source, cure)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"model: {source}: {name} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name].shape)} by the config. {cure}"
            )
    model.load_state_dict(state, assign=True, strict=True)
    return model.eval()


def _refuse(missing: list[str], unexpected: list[str], source: Path, cure: str) -> None:
    if missing:
        raise UserError(
            f"model: {source} lacks {len(missing)} weights, the first {missing[0]}. {cure}"
        )
    if unexpected:
        raise UserError(
            f"model: {source} has {len(unexpected)} weights too many, the first {unexpected[0]}. "
            f"{cure}"
        )


def _renamed(state: dict[str, Any], rules: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Names by the first rule (pattern, replacement) that matches them whole; the rest as it is."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def name(old: str) -> str:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(old):
                return match.expand(replacement)
        return old

    return {name(old): value for old, value in state.items()}


def _transformer(state: dict[str, Any]) -> dict[str, Any]:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    for prefix in COMFYUI_PREFIXES:
        # What has none beside those that do is text encoder and VAE of an all-in-one file.
        own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        state = own or state
    if any(name.startswith("condition_embedder.") for name in state):
        return state  # diffusers' own names, which the conversion would garble
    return dict(convert_wan_transformer_to_diffusers(state))


_RESIDUAL = {"0.gamma": "norm1.gamma", "2": "conv1", "3.gamma": "norm2.gamma", "6": "conv2"}
_VAE_22 = [
    rule
    for old, new, sampler in (
        (r"encoder\.downsamples\.(\d+)\.downsamples", r"encoder.down_blocks.\1", "downsampler"),
        (r"decoder\.upsamples\.(\d+)\.upsamples", r"decoder.up_blocks.\1", "upsampler"),
    )
    for rule in (
        *(
            (
                rf"{old}\.(\d+)\.residual\.{number.split('.')[0]}\.(\w+)",
                rf"{new}.resnets.\2.{name.split('.')[0]}.\3",
            )
            for number, name in _RESIDUAL.items()
        ),
        (rf"{old}\.(\d+)\.shortcut\.(\w+)", rf"{new}.resnets.\2.conv_shortcut.\3"),
        (rf"{old}\.\d+\.((?:resample\.1|time_conv)\.\w+)", rf"{new}.{sampler}.\2"),
    )
]


def _vae(state: dict[str, Any]) -> dict[str, Any]:
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


def _umt5(state: dict[str, Any]) -> dict[str, Any]:
    return _renamed(state, _UMT5)


def _umt5_config(state: State) -> dict[str, Any]:
    vocabulary, width = state["shared.weight"].shape
    first = "encoder.block.0.layer."
    heads = state[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape[1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "d_kv": state[f"{first}0.SelfAttention.q.weight"].shape[0] // heads,
        "d_ff": state[f"{first}1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": _count(state, r"encoder\.block\.(\d+)\..*"),
        "feed_forward_proj": "gated-gelu",
    }


_CLIP_LAYER = r"visual\.transformer\.(\d+)\."
_CLIP = [
    (r"visual\.patch_embedding\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.cls_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.pre_norm\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.post_norm\.(\w+)", r"vision_model.post_layernorm.\1"),
    (_CLIP_LAYER + r"norm([12])\.(\w+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (_CLIP_LAYER + r"attn\.proj\.(\w+)", r"vision_model.encoder.layers.\1.self_attn.out_proj.\2"),
    (_CLIP_LAYER + r"mlp\.0\.(\w+)", r"vision_model.encoder.layers.\1.mlp.fc1.\2"),
    (_CLIP_LAYER + r"mlp\.2\.(\w+)", r"vision_model.encoder.layers.\1.mlp.fc2.\2"),
]
_CLIP_QKV = re.compile(_CLIP_LAYER + r"attn\.to_qkv\.(\w+)")


def _clip(state: State) -> State:
    """The vision half, but for its projection head; the text half has no part in Wan."""
    visual = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("visual.") and not name.startswith("visual.head")
    }
    split: State = {}
    for name in list(visual):
        if match := _CLIP_QKV.fullmatch(name):
            layer, kind = match.groups()
            for part, tensor in zip("qkv", visual.pop(name).chunk(3), strict=True):
                split[f"vision_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] = tensor
    renamed = _renamed(visual, _CLIP) | split
    embeddings = "vision_model.embeddings"
    for name in (f"{embeddings}.class_embedding", f"{embeddings}.position_embedding.weight"):
        if name in renamed:  # (1, 1, D) and (1, tokens, D)
            renamed[name] = renamed[name].squeeze(0)
    if (name := f"{embeddings}.class_embedding") in renamed:
        renamed[name] = renamed[name].squeeze(0)
    return renamed


def _clip_config(state: State) -> dict[str, Any]:
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    tokens = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    return {
        "hidden_size": width,
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(state, r"vision_model\.encoder\.layers\.(\d+)\..*"),
        "num_attention_heads": CLIP_HEADS,
        "image_size": math.isqrt(tokens - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _count(state: State, pattern: str) -> int:
    """Layers by the highest number in the names."""
    numbers = [int(match[1]) for name in state if (match := re.fullmatch(pattern, name))]
    return max(numbers, default=-1) + 1


_CONVERSIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "transformer": _transformer,
    "transformer_2": _transformer,
    "vae": _vae,
    "text_encoder": _umt5,
    "image_encoder": _clip,
}
