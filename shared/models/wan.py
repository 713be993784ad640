"""Wan 2.1 and 2.2: what its models share, and the configs of the published ones.

The configs are from diffusers' `scripts/convert_wan_to_diffusers.py`, which made the published
folders, so that a plan or a benchmark downloads nothing. No weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.models.family import BlockMemory, Family, Mode

_NAMES = json.loads(Path(__file__).with_name("wan_names.json").read_text())
_TRANSFORMER = ("diffusers", "WanTransformer3DModel")
WAN = Family(
    classes={
        "pipeline": ("diffusers", "WanPipeline"),
        "image_pipeline": ("diffusers", "WanImageToVideoPipeline"),
        "image_encoder": ("transformers", "CLIPVisionModel"),
        "image_processor": ("transformers", "CLIPImageProcessor"),
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "T5TokenizerFast"),
        "transformer": _TRANSFORMER,
        "transformer_2": _TRANSFORMER,
        "vae": ("diffusers", "AutoencoderKLWan"),
    },
    text_tokens=512,
    # The published default (`sample_neg_prompt` of the original repository's shared config).
    negative_prompt=(
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
        "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
        "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
    ),
    stride=(4, 8, 8),
    mask_channels=4,
    given_frames={"i2v": (0,), "flf2v": (0, -1)},
    vae_fields={
        "attn_scales": [],
        "dim_mult": [1, 2, 4, 4],
        "is_residual": False,
        "latents_mean": None,
        "latents_std": None,
        "patch_size": None,
        "temperal_downsample": [False, True, True],
    },
    frames_per_second=16,
    # As in the published recipes (brief, section 5); of Wan 2.1's first-last-frame model none is
    # published, and its own sampler's is 16.
    flow_shift=5.0,
    other_flow_shifts={("t2v", True): 12.0, ("flf2v", False): 16.0},
    blocks="blocks",
    patch_embedding="patch_embedding",
    rotary="rope",
    outside_autocast=("condition_embedder.time_embedder", ".norm_q", ".norm_k", ".norm_added_k"),
    names_begin="condition_embedder.",
    original_blocks="blocks",
    lora_layers=_NAMES["lora_layers"],
    memory=BlockMemory(
        kept={"bf16": (42, 4, 8.4, 16), "no": (60.3, 8, 12.1, 32)},
        kept_of_time=32,  # what is made of it is as wide as six hidden states
        backward={"bf16": ((61.3, 3.6), (44, 7.9)), "no": ((84, 7), (60.5, 15.9))},
        backward_of_time={"bf16": 44, "no": 56},
        forward={"bf16": ((20, 0), (8.6, 5.8)), "no": ((40, 0), (16.4, 11.8))},
        forward_with_time={"bf16": ((55.7, 3.8),), "no": ((88, 7.5),)},
    ),
    other_names=_NAMES["other_names"],
    bare_weights=frozenset(_NAMES["bare_weights"]),
)
ORIGINAL_CLASS = "WanModel"
"""Of the transformer in the original code, as its config names it."""
# Switch of the experts as published (the original code has it in Python, no file says it).
BOUNDARIES: Mapping[str, float] = {"i2v": 0.9, "t2v": 0.875}
CLIP_DIM, UMT5_DIM = 1280, 4096
CLIP_TOKENS = 257
"""Of each frame that CLIP sees."""
PATCH = (1, 2, 2)

# The published configs of the two VAEs, which have no config file in this layout. What a smaller
# VAE has otherwise (base_dim, decoder_base_dim) comes from the weights.
_VAES = Path(__file__).with_name("vae_configs")
WAN_21_VAE, WAN_22_VAE = (
    json.loads((_VAES / name).read_text()) for name in ("wan2.1.json", "wan2.2.json")
)


def transformer_config(
    *,
    heads: int,
    width: int,
    ffn_dim: int,
    layers: int,
    channels: tuple[int, int],
    image_dim: int | None,
    **others: Any,
) -> dict[str, Any]:
    """diffusers' config of a transformer with so many channels (in, out); `others` replace."""
    return {
        "_class_name": _TRANSFORMER[1],
        "added_kv_proj_dim": None if image_dim is None else width,
        "attention_head_dim": width // heads,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": ffn_dim,
        "freq_dim": 256,
        "image_dim": image_dim,
        "in_channels": channels[0],
        "num_attention_heads": heads,
        "num_layers": layers,
        "out_channels": channels[1],
        "patch_size": list(PATCH),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "text_dim": UMT5_DIM,
        **others,
    }


_HUB, _ENDING = "wan-ai/", "-diffusers"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One model as its folder in diffusers' layout describes it."""

    hub_id: str
    heads: int
    ffn_dim: int
    layers: int
    mode: Mode
    two_experts: bool = False
    clip: bool = False
    """Whether it takes CLIP's image embeddings (Wan 2.1 i2v and flf2v)."""
    flow_shift: float = 3.0
    """Of the published scheduler; the shift to train with is `ModelSpec.flow_shift`."""
    comfyui: Sequence[str]
    """ComfyUI's files of the transformers, the high-noise expert's first."""
    vae: Mapping[str, Any]
    """Its config."""

    @property
    def width(self) -> int:
        """Of the transformer's hidden states."""
        return self.heads * 128

    @property
    def name(self) -> str:
        """Short, e.g. "wan2.2-i2v-a14b"."""
        return _short(self.hub_id)

    @property
    def boundary(self) -> float | None:
        """Share of the timesteps above which the high-noise expert works."""
        return BOUNDARIES[self.mode] if self.two_experts else None

    def model_index(self) -> dict[str, Any]:
        """Of `model_index.json`."""
        classes = dict(WAN.classes)
        of_text, of_image = classes.pop("pipeline"), classes.pop("image_pipeline")
        some = {
            "image_encoder": self.clip,
            "image_processor": self.clip,
            "transformer_2": self.two_experts,
        }
        return {
            "_class_name": (of_image if self.mode in WAN.given_frames else of_text)[1],
            "boundary_ratio": self.boundary,
            "expand_timesteps": self.mode == "ti2v",
            **{
                part: [*classes[part]] if some.get(part, True) else [None, None] for part in classes
            },
        }

    def transformer_config(self) -> dict[str, Any]:
        """Of each expert: the two are alike."""
        channels = int(self.vae["z_dim"])
        given = WAN.given_frames.get(self.mode, ())
        entering = 2 * channels + WAN.mask_channels if given else channels
        return transformer_config(
            heads=self.heads,
            width=self.width,
            ffn_dim=self.ffn_dim,
            layers=self.layers,
            channels=(entering, channels),
            image_dim=CLIP_DIM if self.clip else None,
            pos_embed_seq_len=CLIP_TOKENS * len(given) if self.mode == "flf2v" else None,
            rope_max_seq_len=1024,
        )

    def scheduler_config(self) -> dict[str, Any]:
        """What differs from diffusers' defaults."""
        return {
            "_class_name": WAN.classes["scheduler"][1],
            "flow_shift": self.flow_shift,
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }


def _short(name: str) -> str:
    return name.lower().removeprefix(_HUB).removesuffix(_ENDING)


_MODELS = json.loads(Path(__file__).with_name("published.json").read_text())
PUBLISHED: Mapping[str, PublishedModel] = {
    model.name: model
    for model in (
        PublishedModel(vae=WAN_22_VAE if facts["mode"] == "ti2v" else WAN_21_VAE, **facts)
        for facts in _MODELS
    )
}
"""By short name."""


def published_model(name: str) -> PublishedModel | None:
    """By short name or hub id, with or without "-Diffusers"; None where it is not one of these."""
    return PUBLISHED.get(_short(name))


def write_configs(model: PublishedModel, folder: Path) -> None:
    """Make `folder` a model in diffusers' layout without weights: configs only."""
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
