"""Model folders in Wan's original layout, in diffusers' terms: which file is which component,
and what diffusers' config files would say.

    high_noise_model/ low_noise_model/      two experts (Wan 2.2 A14B), or else in the folder itself
      config.json, *.safetensors            one transformer (Wan 2.1, TI2V-5B)
    Wan2.1_VAE.pth or Wan2.2_VAE.pth
    models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/
    models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth     Wan 2.1 i2v and flf2v

In place of a .pth file its .safetensors may lie there, or ComfyUI's file by the name that it is
published under. Only JSON and the headers of safetensors are read here.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shared.errors import UserError, first_line, json_kind
from shared.models.tensor_names import unwrapped
from shared.models.wan import (
    BOUNDARIES,
    CLIP_DIM,
    CLIP_TOKENS,
    ORIGINAL_CLASS,
    PATCH,
    UMT5_DIM,
    WAN,
    WAN_21_VAE,
    WAN_22_VAE,
)
from shared.models.wan import transformer_config as diffusers_config

HIGH, LOW = "high_noise_model", "low_noise_model"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
# Component → what to download of a repository in this layout.
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "*": ("*.pth", "*.safetensors"),
    "transformer": (f"{HIGH}/*", "diffusion_pytorch_model*"),
    "transformer_2": (f"{LOW}/*",),
    "vae": ("Wan2.?_VAE.pth",),
    "text_encoder": (TEXT_ENCODER,),
    "tokenizer": (f"{TOKENIZER}/*",),
    "image_encoder": (IMAGE_ENCODER,),
}
# Latent channels of the transformer → file and config of its VAE.
_VAES = {16: ("Wan2.1_VAE.pth", WAN_21_VAE), 48: ("Wan2.2_VAE.pth", WAN_22_VAE)}
# What ComfyUI's repositories call the same components.
_COMFYUI_NAMES: Mapping[str, tuple[str, ...]] = {
    "Wan2.1_VAE.pth": ("wan_2.1_vae.safetensors",),
    "Wan2.2_VAE.pth": ("wan2.2_vae.safetensors",),
    TEXT_ENCODER: (
        "umt5_xxl_fp16.safetensors",
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    IMAGE_ENCODER: ("clip_vision_h.safetensors",),
}


def _names_of(published: str) -> tuple[str, ...]:
    """What a component's file may be called, the published name first."""
    safetensors = f"{published.removesuffix('.pth')}.safetensors"
    return (published, safetensors, *_COMFYUI_NAMES[published])


COMPONENT_NAMES = frozenset(name for published in _COMFYUI_NAMES for name in _names_of(published))
"""All of these, so that none passes for a transformer."""


def is_original(folder: Path) -> bool:
    """Whether a folder is a model in the original layout."""
    if (folder / "model_index.json").exists():
        return False
    if (folder / HIGH / "config.json").exists() or (folder / LOW / "config.json").exists():
        return True
    try:
        return bool(
            json.loads((folder / "config.json").read_bytes())["_class_name"] == ORIGINAL_CLASS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def expert_folder(folder: Path, component: str) -> Path:
    """Where the weights of `transformer` (the high-noise expert, or the only one) or
    `transformer_2` lie."""
    if component == "transformer_2":
        return folder / LOW
    return folder / HIGH if (folder / HIGH).exists() or (folder / LOW).exists() else folder


def original_files(folder: Path, component: str) -> list[Path]:
    """The files of VAE, text encoder or image encoder that are there (of the tokenizer: all of
    it). Of the first three one is expected."""
    if component == "tokenizer":
        return sorted(file for file in (folder / TOKENIZER).glob("*") if file.is_file())
    if component == "vae":
        published = _VAES[_latent_channels(folder)][0]
    else:
        published = {"text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER}[component]
    return [folder / name for name in _names_of(published) if (folder / name).is_file()]


def model_index(folder: Path) -> dict[str, Any]:
    """The fields of `model_index.json` that decide what the model is. Raises UserError."""
    kind = _config(folder, "transformer").get("model_type")
    if kind not in ("t2v", "i2v", "ti2v", "flf2v"):
        raise UserError(
            f"model: {expert_folder(folder, 'transformer')}/config.json has model_type={kind!r}; "
            "wandistill takes t2v, i2v, flf2v and ti2v models."
        )
    two = expert_folder(folder, "transformer") != folder
    return {
        "transformer_2": [*WAN.classes["transformer"]] if two else [None, None],
        "boundary_ratio": BOUNDARIES.get(kind) if two else None,
        "expand_timesteps": kind == "ti2v",
    }


def transformer_config(folder: Path, component: str = "transformer") -> dict[str, Any]:
    """diffusers' config of an expert, from its config.json and the shapes of its weights.

    What the original config leaves out (text_dim, patch_size, whether there are CLIP embeddings)
    is read from the safetensors' headers where they are on this machine. Raises UserError.
    """
    config = _config(folder, component)
    shapes = _shapes(expert_folder(folder, component), component)
    patch = shapes.get("patch_embedding.weight", [0, 0, *config.get("patch_size", PATCH)])[2:]
    text = shapes.get("text_embedding.0.weight", [0, config.get("text_dim", UMT5_DIM)])[1]
    if shapes:
        image = shapes.get("img_emb.proj.1.weight", [0, None])[1]
        positions = shapes.get("img_emb.emb_pos", [0, None])[1]
    else:  # the Wan 2.1 models take CLIP's embeddings; the ones with two experts don't
        one, kind = expert_folder(folder, component) == folder, config.get("model_type")
        image = CLIP_DIM if one and kind in WAN.given_frames else None
        positions = 2 * CLIP_TOKENS if one and kind == "flf2v" else None
    return diffusers_config(
        heads=int(config["num_heads"]),
        width=int(config["dim"]),
        ffn_dim=int(config["ffn_dim"]),
        layers=int(config["num_layers"]),
        channels=(int(config["in_dim"]), int(config["out_dim"])),
        image_dim=image,
        patch_size=list(patch),
        text_dim=text,
        freq_dim=int(config["freq_dim"]),
        cross_attn_norm=bool(config.get("cross_attn_norm", True)),
        qk_norm="rms_norm_across_heads" if config.get("qk_norm", True) else None,
        eps=float(config["eps"]),
        pos_embed_seq_len=positions,
    )


def vae_config(folder: Path) -> dict[str, Any]:
    """diffusers' published config of the VAE that belongs to the transformer's latent channels."""
    return dict(_VAES[_latent_channels(folder)][1])


def _latent_channels(folder: Path) -> int:
    channels = _config(folder, "transformer").get("out_dim")
    if channels not in _VAES:
        known = " and ".join(f"{number} ({name})" for number, (name, _) in _VAES.items())
        raise UserError(
            f"model: {expert_folder(folder, 'transformer')}/config.json has out_dim={channels!r}; "
            f"the original VAEs have {known} latent channels."
        )
    return int(channels)


def _config(folder: Path, component: str) -> dict[str, Any]:
    return read_json(expert_folder(folder, component) / "config.json", "model")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from `path`; UserError naming `what` and the file when there is none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{what}: cannot read {path} ({error.strerror or error}). Download the whole folder "
            "again."
        ) from error
    except ValueError as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} holds {json_kind(value)}, expected an object.")
    return value


def _shapes(folder: Path, component: str) -> dict[str, list[int]]:
    """Name → shape of all tensors in the safetensors files of a folder, by their headers."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name in COMPONENT_NAMES:
            continue
        with opened(file, "np") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return unwrapped(component, shapes)


@contextmanager
def opened(file: Path, framework: str = "pt") -> Iterator[Any]:
    """Block with a model's safetensors file. UserError where it is damaged."""
    try:
        with safe_open(file, framework=framework) as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model: {file} is damaged ({first_line(error)}). Download it again."
        ) from error
