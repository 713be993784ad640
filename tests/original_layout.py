"""A model folder rewritten in Wan's original layout: the names that the original code has.

Nothing of `shared` is imported: this is the other direction, made independently.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Rules = tuple[tuple[str, str], ...]
TRANSFORMER: Rules = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"(?<=\d\.)scale_shift_table", "modulation"),
    (r"(?<=\d\.)norm2", "norm3"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "o"),
    (r"add_([kv])_proj", r"\1_img"),
    (r"norm_added_k", "norm_k_img"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
)
BLOCK: Rules = (
    (r"\.norm1\.gamma", ".residual.0.gamma"),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.gamma", ".residual.3.gamma"),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
ENDS: Rules = (
    (r"coder\.conv_in", "coder.conv1"),
    (r"coder\.norm_out", "coder.head.0"),
    (r"coder\.conv_out", "coder.head.2"),
    (r"^post_quant_conv", "conv2"),
    (r"^quant_conv", "conv1"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.resnets\.1", "middle.2"),
)
VAE_21: Rules = (*ENDS, (r"encoder\.down_blocks", "encoder.downsamples"))
UMT5: Rules = (
    (r"^shared", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block\.", "blocks."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention", "attn"),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
)
CLIP: Rules = (
    (r"^(?:vision_model\.)?embeddings\.patch_embedding", "visual.patch_embedding"),
    (r"^(?:vision_model\.)?embeddings\.class_embedding", "visual.cls_embedding"),
    (r"^(?:vision_model\.)?embeddings\.position_embedding\.weight", "visual.pos_embedding"),
    (r"^(?:vision_model\.)?pre_layrnorm", "visual.pre_norm"),
    (r"^(?:vision_model\.)?post_layernorm", "visual.post_norm"),
    (r"^(?:vision_model\.)?encoder\.layers", "visual.transformer"),
    (r"layer_norm", "norm"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
)
VAE_FILE = {16: "Wan2.1_VAE.pth", 48: "Wan2.2_VAE.pth"}
State = dict[str, torch.Tensor]


def renamed(state: State, rules: Rules) -> State:
    def name(old: str) -> str:
        for pattern, replacement in rules:
            old = re.sub(pattern, replacement, old)
        return old

    return {name(old): tensor for old, tensor in state.items()}


def vae_21(state: State) -> State:
    """The decoder's blocks stand in one row: three residual ones and an upsampler each."""
    result = {}
    for name, tensor in renamed(state, VAE_21).items():
        if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.", name):
            place = int(match[1]) * 4 + (int(match[3]) if match[2] == "resnets" else 3)
            name = f"decoder.upsamples.{place}.{name[match.end() :]}"
        if "middle" in name or "samples" in name:
            (name,) = renamed({name: tensor}, BLOCK)
        result[name] = tensor
    return result


def vae_22(state: State) -> State:
    """Nested rows: each stage has its residual blocks, then its sampler."""
    result = {}
    for name, tensor in renamed(state, ENDS).items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"downsamples.\1.downsamples", name)
        name = re.sub(r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", r"upsamples.\1.upsamples", name)
        name = re.sub(r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3", name)
        if "middle" in name or "samples" in name:
            (name,) = renamed({name: tensor}, BLOCK)
        result[name] = tensor
    return result


def clip(state: State) -> State:
    result = renamed(state, CLIP)
    for name in [name for name in result if name.endswith("self_attn.q_proj.weight")]:
        stem = name.removesuffix("self_attn.q_proj.weight")
        for kind in ("weight", "bias"):
            parts = [result.pop(f"{stem}self_attn.{part}_proj.{kind}") for part in "qkv"]
            result[f"{stem}attn.to_qkv.{kind}"] = torch.cat(parts)
    result["visual.cls_embedding"] = result["visual.cls_embedding"][None, None]
    result["visual.pos_embedding"] = result["visual.pos_embedding"][None]
    # What Wan has no use for: the projection, and the text half.
    result["visual.head"] = torch.ones(3, 2)
    result["textual.token_embedding.weight"] = torch.ones(5, 2)
    result["log_scale"] = torch.tensor(1.0)
    return result


def write_original(model: Path, folder: Path, *, prefix: str = "") -> Path:
    """Write the model of a diffusers folder to `folder` in the original layout.

    `prefix` stands before the transformers' names, as in ComfyUI's single files.
    """
    index = json.loads((model / "model_index.json").read_text())
    two = index["transformer_2"][0] is not None
    folder.mkdir(parents=True)
    for component, name in (
        ("transformer", "high_noise_model"),
        ("transformer_2", "low_noise_model"),
    ):
        if component == "transformer" or two:
            _transformer(model / component, folder / name if two else folder, index, prefix)
    config = json.loads((model / "vae/config.json").read_text())
    vae = load_file(model / "vae/diffusion_pytorch_model.safetensors")
    convert = vae_22 if config["z_dim"] == 48 else vae_21
    torch.save(convert(vae), folder / VAE_FILE[config["z_dim"]])
    text = load_file(model / "text_encoder/model.safetensors")
    torch.save(renamed(text, UMT5), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(model / "tokenizer", folder / "google/umt5-xxl")
    if (model / "image_encoder").exists():
        state = clip(load_file(model / "image_encoder/model.safetensors"))
        torch.save(state, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    return folder


def _transformer(source: Path, folder: Path, index: dict[str, object], prefix: str) -> None:
    config = json.loads((source / "config.json").read_text())
    heads, channels = config["num_attention_heads"], config["in_channels"]
    i2v = "flf2v" if config.get("pos_embed_seq_len") else "i2v"
    kind = "ti2v" if index["expand_timesteps"] else "t2v" if channels == 16 else i2v
    original = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": heads * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": channels,
        "model_type": kind,
        "num_heads": heads,
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original))
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    names = {prefix + name: tensor for name, tensor in renamed(state, TRANSFORMER).items()}
    parts = sorted(names)
    for number, part in enumerate((parts[::2], parts[1::2]), start=1):
        file = folder / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: names[name].contiguous() for name in part}, file)
