"""Wan models small enough for a test: the real classes, random weights, diffusers' layout."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

import shared

TOKENIZER = Path(shared.__file__).parent / "toy" / "common" / "tokenizer"
LATENT_CHANNELS = 16
TEXT_DIM = 32
BOUNDARY = {"t2v": 0.875, "i2v": 0.9}
PIPELINE = {
    "t2v": "WanPipeline",
    "i2v": "WanImageToVideoPipeline",
    "ti2v": "WanPipeline",
    "wan21-i2v": "WanImageToVideoPipeline",
    "wan21-flf2v": "WanImageToVideoPipeline",
}
WITH_CLIP = ("wan21-i2v", "wan21-flf2v")
TI2V_CHANNELS = 48
IMAGE_DIM, IMAGE_SIZE = 32, 42
IMAGE_TOKENS = 10
Mode = Literal["t2v", "i2v", "ti2v", "wan21-i2v", "wan21-flf2v"]


def tiny_ti2v_vae() -> AutoencoderKLWan:
    """The Wan 2.2 VAE's form (TI2V-5B): strides (4, 16, 16), 48 channels, pixels in patches."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=TI2V_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.03 * (channel - 20.3) for channel in range(TI2V_CHANNELS)],
        latents_std=[0.4 + 0.05 * channel for channel in range(TI2V_CHANNELS)],
    )


def tiny_vae() -> AutoencoderKLWan:
    """The Wan 2.1 VAE's form: strides (4, 8, 8), 16 channels; mean and std tell on forgetters."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.07 * (channel - 6.3) for channel in range(LATENT_CHANNELS)],
        latents_std=[0.45 + 0.11 * channel for channel in range(LATENT_CHANNELS)],
    )


def tiny_transformer(mode: str, **overrides: Any) -> WanTransformer3DModel:
    """A Wan transformer of two layers; `overrides` replace fields of its config."""
    i2v = 2 * LATENT_CHANNELS + 4
    inputs = {"t2v": LATENT_CHANNELS, "ti2v": TI2V_CHANNELS}
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": inputs.get(mode, i2v),
        "out_channels": TI2V_CHANNELS if mode == "ti2v" else LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 256,
    }
    if mode in WITH_CLIP:
        config |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 32}
    if mode == "wan21-flf2v":
        config["pos_embed_seq_len"] = 2 * IMAGE_TOKENS
    transformer = WanTransformer3DModel(**(config | overrides))
    if mode == "wan21-flf2v":  # the class begins with zeros
        transformer.condition_embedder.image_embedder.pos_embed.data.normal_()
    return transformer


def tiny_image_encoder() -> CLIPVisionModel:
    """Random CLIP ViT: (B, 3, 42, 42) pixels to (B, IMAGE_TOKENS, IMAGE_DIM)."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=16,  # as in the original code, where no file says it
        image_size=IMAGE_SIZE,
        patch_size=14,
        hidden_act="gelu",
        initializer_range=0.2,
    )
    return CLIPVisionModel(config)


def tiny_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Random UMT5 encoder: (B, L) token ids to (B, L, TEXT_DIM)."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def tiny_model(
    folder: Path,
    mode: Mode,
    *,
    two_experts: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vae: AutoencoderKLWan | None = None,
    **transformer: Any,
) -> Path:
    """Write a whole model to `folder` (diffusers layout) and return it.

    Every weight is random from `seed`, and the experts differ. `transformer` overrides fields of
    the transformers' config (a wider one for a memory test), `vae` the VAE. Weights are stored in
    `dtype`.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        components = {
            "text_encoder": tiny_text_encoder(len(tokenizer)),
            "vae": vae or (tiny_ti2v_vae() if mode == "ti2v" else tiny_vae()),
            "transformer": tiny_transformer(mode, **transformer),
        }
        if two_experts:
            components["transformer_2"] = tiny_transformer(mode, **transformer)
        if mode in WITH_CLIP:
            components["image_encoder"] = tiny_image_encoder()
            CLIPImageProcessorPil(
                size={"shortest_edge": IMAGE_SIZE},
                crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            ).save_pretrained(folder / "image_processor")
    for name, component in components.items():
        for parameter in component.parameters():
            parameter.data = parameter.data.to(dtype)
        component.save_pretrained(folder / name)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ).save_pretrained(folder / "scheduler")

    index: dict[str, Any] = {
        "_class_name": PIPELINE[mode],
        "expand_timesteps": mode == "ti2v",
        "boundary_ratio": BOUNDARY[mode] if two_experts else None,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if two_experts else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if mode == "i2v":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    if mode in WITH_CLIP:
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def full_once(monkeypatch: Any) -> None:
    """The next decode of a VAE runs out of memory, as on a small card."""
    whole = AutoencoderKLWan._decode

    def decode(self: Any, *given: Any, **options: Any) -> Any:
        monkeypatch.setattr(AutoencoderKLWan, "_decode", whole)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoencoderKLWan, "_decode", decode)


def one_expert(model: Path | str) -> tuple[str, ...]:
    """Options for the low-noise expert alone where the model has two, in either layout."""
    two = any((Path(model) / name).is_dir() for name in ("transformer_2", "low_noise_model"))
    return ("--boundary-type", "low") if two else ()
