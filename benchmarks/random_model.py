"""Model folders of published Wan models at their true size, with random weights: nothing is loaded.

One random chunk of N(0, 0.02²) is repeated through all matrices, norms are 1: enough for what
depends on sizes alone, i.e. time and memory.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

import shared
from shared.models.wan import PublishedModel, write_configs

SHARD_BYTES = 4 * 10**9
_CHUNK = 1 << 24


def on_meta(kind: Any, config: Any) -> Any:
    """A model that has shapes and no values."""
    with torch.device("meta"):
        return kind(config) if isinstance(config, UMT5Config) else kind.from_config(config)


def umt5_config(*, quick: bool) -> UMT5Config:
    """Of UMT5-XXL, as google/umt5-xxl publishes it; quick: as wide, but two small layers."""
    small = {"d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512}
    xxl = {"d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    return UMT5Config(
        d_model=4096, d_kv=64, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        **(small if quick else xxl),
    )  # fmt: skip


def write_weights(model: nn.Module, folder: Path, stem: str) -> None:
    """Safetensors of a model on torch's meta device in bf16, cut as its libraries cut them."""
    folder.mkdir(parents=True, exist_ok=True)
    chunk = (0.02 * torch.randn(_CHUNK, generator=torch.Generator().manual_seed(1))).bfloat16()
    shards: list[list[tuple[str, torch.Size]]] = [[]]
    held = 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        if held + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append((name, parameter.shape))
        held += size
    placed = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _values(name, shape, chunk) for name, shape in shard}, folder / file)
        placed |= {name: file for name, _ in shard}
    index = {"metadata": {}, "weight_map": placed}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _values(name: str, shape: torch.Size, chunk: torch.Tensor) -> torch.Tensor:
    if "norm" in name and not name.endswith("bias"):
        return torch.ones(shape, dtype=chunk.dtype)
    count = math.prod(shape)
    return chunk.repeat(-(-count // len(chunk)))[:count].view(shape).contiguous()


def write_model(model: PublishedModel, component: str, folder: Path) -> Path:
    """All configs, and the weights of one transformer; the folder."""
    write_configs(model, folder)
    transformer = on_meta(WanTransformer3DModel, model.transformer_config())
    write_weights(transformer, folder / component, "diffusion_pytorch_model")
    return folder


def add_encoders(folder: Path, *, quick: bool) -> None:
    """VAE, text encoder, and a tokenizer whose few tokens the encoder has."""
    vae = json.loads((folder / "vae" / "config.json").read_text())
    AutoencoderKLWan.from_config(vae).save_pretrained(folder / "vae")
    config = umt5_config(quick=quick)
    config.architectures = [UMT5EncoderModel.__name__]
    config.save_pretrained(folder / "text_encoder")
    write_weights(on_meta(UMT5EncoderModel, config), folder / "text_encoder", "model")
    tokenizer = Path(shared.__file__).parent / "toy" / "common" / "tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
