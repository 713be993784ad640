"""The configs of the published Wan models, so that a plan or a benchmark downloads nothing.

From diffusers' `scripts/convert_wan_to_diffusers.py`, which made the published folders. No weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.models.original_layout import BOUNDARIES, CLIP_DIM, UMT5_DIM, WAN_21_VAE, WAN_22_VAE

_HUB, _ENDING = "Wan-AI/", "-Diffusers"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One model as its folder in diffusers' layout describes it."""

    hub_id: str
    heads: int
    ffn_dim: int
    layers: int
    mode: Literal["t2v", "i2v", "ti2v"]
    two_experts: bool = False
    clip: bool = False
    """Whether it takes CLIP's image embeddings (Wan 2.1 i2v)."""
    flow_shift: float = 3.0
    """Of the published scheduler; the shift to train with is `ModelSpec.flow_shift`."""
    vae: Mapping[str, Any] = field(default_factory=lambda: WAN_21_VAE)

    @property
    def name(self) -> str:
        """Short, e.g. "wan2.2-i2v-a14b"."""
        return self.hub_id.removeprefix(_HUB).removesuffix(_ENDING).lower()

    @property
    def boundary(self) -> float | None:
        """Share of the timesteps above which the high-noise expert works."""
        return BOUNDARIES[self.mode] if self.two_experts else None

    def model_index(self) -> dict[str, Any]:
        """Of `model_index.json`."""
        transformer = ["diffusers", "WanTransformer3DModel"]
        pipeline = "WanImageToVideoPipeline" if self.mode == "i2v" else "WanPipeline"
        return {
            "_class_name": pipeline,
            "boundary_ratio": self.boundary,
            "expand_timesteps": self.mode == "ti2v",
            "image_encoder": ["transformers", "CLIPVisionModel"] if self.clip else [None, None],
            "image_processor": ["transformers", "CLIPImageProcessor"]
            if self.clip
            else [None, None],
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": transformer,
            "transformer_2": transformer if self.two_experts else [None, None],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }

    def transformer_config(self) -> dict[str, Any]:
        """Of each expert: the two are alike."""
        channels, head = int(self.vae["z_dim"]), 128
        return {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": self.heads * head if self.clip else None,
            "attention_head_dim": head,
            "cross_attn_norm": True,
            "eps": 1e-06,
            "ffn_dim": self.ffn_dim,
            "freq_dim": 256,
            "image_dim": CLIP_DIM if self.clip else None,
            # i2v: 4 channels of mask and the condition beside the noisy latents
            "in_channels": 2 * channels + 4 if self.mode == "i2v" else channels,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "out_channels": channels,
            "patch_size": [1, 2, 2],
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": UMT5_DIM,
        }

    def scheduler_config(self) -> dict[str, Any]:
        """What differs from diffusers' defaults."""
        return {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": self.flow_shift,
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }


def _size_14b(hub_id: str, mode: Literal["t2v", "i2v"], **others: Any) -> PublishedModel:
    return PublishedModel(
        hub_id=_HUB + hub_id + _ENDING, heads=40, ffn_dim=13824, layers=40, mode=mode, **others
    )


_MODELS = (
    PublishedModel(
        hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", heads=12, ffn_dim=8960, layers=30, mode="t2v"
    ),
    _size_14b("Wan2.1-T2V-14B", "t2v"),
    _size_14b("Wan2.1-I2V-14B-480P", "i2v", clip=True),
    _size_14b("Wan2.1-I2V-14B-720P", "i2v", clip=True),
    _size_14b("Wan2.2-T2V-A14B", "t2v", two_experts=True),
    _size_14b("Wan2.2-I2V-A14B", "i2v", two_experts=True),
    PublishedModel(
        hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        heads=24,
        ffn_dim=14336,
        layers=30,
        mode="ti2v",
        flow_shift=5.0,
        vae=WAN_22_VAE,
    ),
)
PUBLISHED: Mapping[str, PublishedModel] = {model.name: model for model in _MODELS}
"""By short name."""


def published_model(name: str) -> PublishedModel | None:
    """By short name or hub id, with or without "-Diffusers"; None where it is not one of these."""
    return PUBLISHED.get(name.removeprefix(_HUB).removesuffix(_ENDING).lower())


def write_configs(model: PublishedModel, folder: Path) -> None:
    """Make `folder` a model in diffusers' layout without weights: configs alone."""
    files = {
        "model_index.json": model.model_index(),
        "transformer/config.json": model.transformer_config(),
        "vae/config.json": dict(model.vae),
        "scheduler/scheduler_config.json": model.scheduler_config(),
    }
    if model.two_experts:
        files["transformer_2/config.json"] = model.transformer_config()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
