"""Published Wan models at their true size with random weights: nothing is loaded.

One random chunk of N(0, 0.02²) is repeated through all matrices, norms are 1: enough for what
depends on sizes alone, i.e. time and memory. Of a transformer no file is written: a run is given
one that was made where it is needed.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

import shared
from shared.models.spec import ModelSpec
from train.model.custom_weights import empty_transformer

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


@torch.no_grad()
def random_transformer(
    spec: ModelSpec, component: str, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """One of a model's transformers, made on `device`, in the dtypes that loading gives it."""
    transformer = empty_transformer(spec, component)
    whole = set(transformer._keep_in_fp32_modules or ())
    chunk = _chunk().to(device)
    for prefix, module in transformer.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                full = f"{prefix}.{name}"
                own = torch.float32 if whole & set(full.split(".")) else dtype
                values = torch.empty(weight.shape, dtype=own, device=device)
                module._parameters[name] = nn.Parameter(_filled(full, values, chunk))
    return transformer.to(device).eval()  # what is left are buffers


@contextmanager
def random_weights(device: torch.device) -> Iterator[dict[str, float]]:
    """Runs in this block are given random weights on `device` where they would read a model's.

    All else is the run's own way. The block gets the seconds that making them took.
    """
    seconds = {"build": 0.0}

    def made(spec: ModelSpec, component: str, *, dtype: torch.dtype, own: Path | None) -> Any:
        began = time.perf_counter()
        transformer = random_transformer(spec, component, dtype=dtype, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds["build"] += time.perf_counter() - began
        return transformer

    with (
        patch("train.model.base.load_weights", made),
        patch("train.session.base_digest", lambda *_: "random"),
    ):
        yield seconds


def write_weights(model: nn.Module, folder: Path, stem: str) -> None:
    """Safetensors of a model on torch's meta device in bf16, cut as its libraries cut them."""
    folder.mkdir(parents=True, exist_ok=True)
    chunk = _chunk()
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
        bf16 = torch.bfloat16
        values = {n: _filled(n, torch.empty(shape, dtype=bf16), chunk) for n, shape in shard}
        save_file(values, folder / file)
        placed |= {name: file for name, _ in shard}
    index = {"metadata": {}, "weight_map": placed}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _chunk() -> torch.Tensor:
    return (0.02 * torch.randn(_CHUNK, generator=torch.Generator().manual_seed(1))).bfloat16()


def _filled(name: str, values: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    if "norm" in name and not name.endswith("bias"):
        return values.fill_(1.0)
    flat, count = values.view(-1), math.prod(values.shape)
    for start in range(0, count, len(chunk)):
        part = flat[start : start + len(chunk)]
        part.copy_(chunk[: len(part)])
    return values


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
