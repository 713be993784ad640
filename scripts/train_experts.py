"""Train the toys of the harder world: for t2v and i2v a base from the plain world's toy, then both
experts from it.

Flow matching on cached latents of `speed_world.py`. An expert goes on from the base on its own
noise levels only, and forgets the others, as real ones do. Captions lie: each word about the clip
is, with probability CAPTION_NOISE, drawn at random, as captions of the web are. So the model is
unsure without guidance and needs a CFG scale of 4 or so.

    python scripts/train_experts.py t2v base --steps 2400
    python scripts/train_experts.py t2v high --steps 600 --rate 0.3      # and low; then i2v

Resumes from its own checkpoint. Weights go to shared/toy as it goes.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from init_toy_model import BOUNDARIES, LATENT_CHANNELS, TOY, save_component
from render_clips import COLOURS, MOTIONS, SHAPES
from safetensors.torch import load_file, save_file
from speed_world import CAPTIONS, SPEEDS, STILL, parse_caption, render_clip
from toy_sampling import (
    attend_to_padding,
    embed_captions,
    normalise,
    timestep_shift,
    velocity,
    with_mask,
)
from train_toy_transformer import (
    ADAMW_LR,
    CLIPS_AT_ONCE,
    FIRST_SEED,
    MUON_LR,
    learning_rate,
    make_optimizers,
)
from train_toy_vae import encode_moments, to_pixels

BATCH = 48
EMA_DECAY = 0.998
CAPTION_DROPOUT = 0.1
CAPTION_NOISE = 0.35
SHIFT = 3.0
EXPORT_EVERY = 500
SLOTS = {"high": "transformer", "low": "transformer_2"}


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
    """The model that a part goes on from: the plain world's toy, or the base."""
    transformer = WanTransformer3DModel.from_pretrained(TOY / mode / "transformer")
    if part != "base":
        transformer.load_state_dict(torch.load(work / f"{mode}-base.pt", weights_only=True)["ema"])
    return transformer


def train(mode: str, part: str, steps: int, clips: int, rate: float, work: Path) -> None:
    text = embed_captions([*CAPTIONS, ""], TOY / "common")
    latents = cached_latents(clips, condition=False, work=work)
    conditions = cached_latents(clips, condition=True, work=work) if mode == "i2v" else None

    torch.manual_seed(0)
    transformer = start(mode, part, work)
    attend_to_padding(transformer, text.shape[1])
    compiled = torch.compile(transformer)
    ema = copy.deepcopy(transformer).requires_grad_(False)
    optimizers = make_optimizers(transformer)
    rates = [rate * MUON_LR, rate * ADAMW_LR]

    first, checkpoint = 0, work / f"{mode}-{part}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]

    began, running = time.monotonic(), 0.0
    for step in range(first, steps):
        for optimizer, one in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = one * learning_rate(step, steps)
        rng = np.random.default_rng([11, step])
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(clips, (BATCH,), generator=generator)
        captions = noisy_captions(picks.numpy() % len(CAPTIONS), rng)
        captions[rng.random(BATCH) < CAPTION_DROPOUT] = len(CAPTIONS)
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        sigma = levels(part, mode, u)

        x0 = latents[picks].float()
        noise = torch.randn(x0.shape, generator=generator)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * x0 + level * noise
        condition = None if conditions is None else with_mask(conditions[picks].float())
        predicted = velocity(compiled, noisy, sigma, text[torch.from_numpy(captions)], condition)
        loss = (predicted - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            for average, weight in zip(ema.parameters(), transformer.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

        running += loss.item()
        if (step + 1) % 100 == 0:
            elapsed = time.monotonic() - began
            print(f"{mode} {part} {step + 1} loss {running / 100:.4f} {elapsed:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % EXPORT_EVERY == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "transformer": transformer.state_dict(),
                "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            if part != "base":
                save_component(copy.deepcopy(ema), TOY / f"experts-{mode}" / SLOTS[part])


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
