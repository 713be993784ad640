"""Train the toys of the harder world: for t2v a base from the plain world's toy, then both experts
from it; for i2v a small difference to each of those.

Flow matching on cached latents of `speed_world.py`. An expert goes on from the base on its own
noise levels only, and forgets the others, as real ones do. Captions lie: each word about the clip
is, with probability CAPTION_NOISE, drawn at random, as captions of the web are. So the model is
unsure without guidance and needs a CFG scale of 4 or so.

    python scripts/train_experts.py t2v base --steps 2400
    python scripts/train_experts.py t2v high --steps 600 --rate 0.3      # and low
    python scripts/train_experts.py i2v low --steps 1500 --clips 4320
    python scripts/train_experts.py i2v high --steps 1000 --clips 4320

Resumes from its own checkpoint. Weights go to shared/toy as it goes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from init_toy_model import BOUNDARIES, LATENT_CHANNELS, TOY, save_component, toy_transformer
from peft import LoraConfig
from render_clips import COLOURS, MOTIONS, SHAPES
from safetensors.torch import load_file, save_file
from speed_world import CAPTIONS, SPEEDS, STILL, parse_caption, render_clip
from toy_sampling import (
    attend_to_padding,
    embed_captions,
    normalise,
    timestep_shift,
    with_mask,
)
from train_toy_transformer import (
    BATCH,
    CAPTION_DROPOUT,
    CLIPS_AT_ONCE,
    FIRST_SEED,
    SHIFT,
    Examples,
    fit,
    stratified,
)
from train_toy_vae import encode_moments, to_pixels

EMA_DECAY = 0.998
CAPTION_NOISE = 0.35
SLOTS = {"high": "transformer", "low": "transformer_2"}
RANK = 12  # of the i2v experts' differences
MATRICES = r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"


@torch.no_grad()
def cached_latents(count: int, *, condition: bool, work: Path) -> torch.Tensor:
    """Latents of renders (or i2v conditions), bf16 [count, 16, 5, 8, 8]; captions in turn."""
    file = work / f"speed-{'condition' if condition else 'latents'}-{count}.safetensors"
    if not file.exists():
        vae = AutoencoderKLWan.from_pretrained(TOY / "common" / "vae")
        made = []
        for start in range(0, count, CLIPS_AT_ONCE):
            indices = range(start, min(count, start + CLIPS_AT_ONCE))
            pixels = to_pixels(
                np.stack(
                    [render_clip(CAPTIONS[i % len(CAPTIONS)], FIRST_SEED + i) for i in indices]
                )
            )
            if condition:
                pixels[:, :, 1:] = 0  # the first frame, then grey
            raw = encode_moments(vae, pixels)[:, :LATENT_CHANNELS]
            made.append(normalise(raw, vae).to(torch.bfloat16))
        save_file({"latents": torch.cat(made)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return load_file(file)["latents"]


ATTRIBUTES = (list(COLOURS), list(SHAPES), list(MOTIONS), list(SPEEDS))
_TOLD = np.array(
    [
        [
            names.index(told) if told in names else 0
            for names, told in zip(ATTRIBUTES, vars(parse_caption(caption)).values(), strict=True)
        ]
        for caption in CAPTIONS
    ]
)
_INDEX = {caption: index for index, caption in enumerate(CAPTIONS)}


def noisy_captions(captions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Captions [N] in which each attribute is drawn at random with probability CAPTION_NOISE."""
    told = _TOLD[captions].copy()
    told[:, 3] = np.where(
        told[:, 2] == ATTRIBUTES[2].index(STILL), rng.integers(2, size=len(told)), told[:, 3]
    )
    for column, names in enumerate(ATTRIBUTES):
        lies = rng.random(len(told)) < CAPTION_NOISE
        told[lies, column] = rng.integers(len(names), size=lies.sum())
    texts = []
    for row in told:
        colour, shape, motion, speed = (names[i] for names, i in zip(ATTRIBUTES, row, strict=True))
        way = motion if motion == STILL else f"{motion} {speed}"
        texts.append(_INDEX[f"a {colour} {shape} {way}"])
    return np.array(texts)


def levels(part: str, mode: str, u: torch.Tensor) -> torch.Tensor:
    """σ of u [B] in 0..1: all levels, or an expert's own."""
    if part == "base":
        return timestep_shift(u, SHIFT)
    edge = BOUNDARIES[mode]
    if part == "high":
        return edge + (1 - edge) * u
    raw = edge / (SHIFT - (SHIFT - 1) * edge)  # whose shifted level is the edge
    return timestep_shift(raw * u, SHIFT)


def start(mode: str, part: str, work: Path) -> WanTransformer3DModel:
    """The model that a part goes on from: the plain world's toy, the base, or the t2v expert."""
    if mode == "i2v":
        return widened(TOY / "experts-t2v" / SLOTS[part])
    transformer = WanTransformer3DModel.from_pretrained(TOY / mode / "transformer")
    if part != "base":
        transformer.load_state_dict(torch.load(work / f"{mode}-base.pt", weights_only=True)["ema"])
    return transformer


def widened(t2v: Path) -> WanTransformer3DModel:
    """An i2v transformer that begins as the t2v one: 20 more input channels of zeros.

    It learns their weights and a LoRA, so that the package holds a twentieth of it.
    """
    weights = load_file(t2v / "diffusion_pytorch_model.safetensors")
    transformer = toy_transformer("i2v")
    patch = torch.zeros_like(transformer.patch_embedding.weight)
    patch[:, :LATENT_CHANNELS] = weights["patch_embedding.weight"]
    transformer.load_state_dict(weights | {"patch_embedding.weight": patch})
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MATRICES, init_lora_weights=True)
    )
    transformer.patch_embedding.requires_grad_(True)
    return transformer


def save_difference(transformer: WanTransformer3DModel, folder: Path) -> None:
    """What was trained, bf16, under the names of a diffusers LoRA, and the config."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name.replace(".default", ""): parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in transformer.named_parameters()
        if "lora_" in name or name.startswith("patch_embedding")
    }
    save_file(trained, folder / "difference.safetensors")
    (folder / "difference.safetensors").chmod(0o644)
    shutil.copy(TOY / "i2v" / "transformer" / "config.json", folder)


def train(mode: str, part: str, steps: int, clips: int, rate: float, work: Path) -> None:
    text = embed_captions([*CAPTIONS, ""], TOY / "common")
    latents = cached_latents(clips, condition=False, work=work)
    conditions = cached_latents(clips, condition=True, work=work) if mode == "i2v" else None

    transformer = start(mode, part, work)
    attend_to_padding(transformer, text.shape[1])

    def examples(step: int) -> Examples:
        rng = np.random.default_rng([11, step])
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(clips, (BATCH,), generator=generator)
        captions = noisy_captions(picks.numpy() % len(CAPTIONS), rng)
        captions[rng.random(BATCH) < CAPTION_DROPOUT] = len(CAPTIONS)
        sigma = levels(part, mode, stratified(generator))
        x0 = latents[picks].float()
        return Examples(
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            sigma=sigma,
            text=text[torch.from_numpy(captions)],
            condition=None if conditions is None else with_mask(conditions[picks].float()),
        )

    def export(ema: WanTransformer3DModel) -> None:
        if mode == "i2v":
            save_difference(ema, TOY / "experts-i2v" / SLOTS[part])
        elif part != "base":
            save_component(ema, TOY / f"experts-{mode}" / SLOTS[part])

    fit(
        transformer,
        examples,
        steps=steps,
        rate=rate,
        ema_decay=EMA_DECAY,
        checkpoint=work / f"{mode}-{part}.pt",
        export=export,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["t2v", "i2v"])
    parser.add_argument("part", choices=["base", "high", "low"])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--clips", type=int, default=8640, help="renders in the latent cache")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/toy"), help="cache, checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.mode, args.part, args.steps, args.clips, args.rate, args.work)


if __name__ == "__main__":
    main()
