"""Train the toy Wan transformers: t2v from scratch, then i2v from the t2v weights.

Flow matching on cached normalised latents of renders. Resumes from its own checkpoint; a larger
`--steps` continues a finished run. Averaged weights are written to shared/toy as it goes.

    python scripts/train_toy_transformer.py t2v --steps 5500
    python scripts/train_toy_transformer.py i2v --steps 2600
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from init_toy_model import LATENT_CHANNELS, TOY, save_component, toy_transformer
from muon import Muon
from render_clips import CAPTIONS, render_clip
from safetensors.torch import load_file, save_file
from toy_sampling import (
    attend_to_padding,
    embed_captions,
    normalise,
    timestep_shift,
    velocity,
    with_mask,
)
from train_toy_vae import encode_moments, to_pixels

BATCH = 48
WARMUP_STEPS = 200
DECAY_SHARE = 0.35  # of the steps, at the end, in which the learning rate goes to nothing
MUON_LR, ADAMW_LR = 2e-2, 3e-3
EMA_DECAY = 0.9985
CAPTION_DROPOUT = 0.1
SHIFT = 3.0
EXPORT_EVERY = 500  # steps
CLIPS_AT_ONCE = 20
FIRST_SEED = 1_000_000


@torch.no_grad()
def cached_latents(count: int, with_condition: bool, work: Path) -> tuple[torch.Tensor, ...]:
    """Latents of `count` renders and their i2v conditions, bf16 [count, 16, 5, 8, 8] each.

    Clip i shows caption i % 60. Made once per VAE encoder and count, then read from `work`.
    """
    folder = TOY / "common" / "vae"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = AutoencoderKLWan.load_config(folder)
    digest = hashlib.sha256(repr((config["latents_mean"], config["latents_std"])).encode())
    for name in sorted(weights):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(weights[name].view(torch.uint8).numpy().tobytes())
    what = "condition" if with_condition else "latents"
    file = work / f"{what}-{count}-{digest.hexdigest()[:12]}.safetensors"
    if not file.exists():
        vae = AutoencoderKLWan.from_pretrained(folder)
        made = []
        for start in range(0, count, CLIPS_AT_ONCE):
            indices = range(start, min(count, start + CLIPS_AT_ONCE))
            clips = [render_clip(CAPTIONS[i % 60], FIRST_SEED + i) for i in indices]
            pixels = to_pixels(np.stack(clips))
            if with_condition:
                pixels[:, :, 1:] = 0  # the first frame, then grey
            raw = encode_moments(vae, pixels)[:, :LATENT_CHANNELS]
            made.append(normalise(raw, vae).to(torch.bfloat16))
        save_file({what: torch.cat(made)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return load_file(file)[what]


def start_from_t2v(transformer: WanTransformer3DModel) -> None:
    """Give an i2v transformer the t2v weights; its 20 extra input channels start at zero."""
    weights = load_file(TOY / "t2v" / "transformer" / "diffusion_pytorch_model.safetensors")
    patch = torch.zeros_like(transformer.patch_embedding.weight)
    patch[:, :LATENT_CHANNELS] = weights["patch_embedding.weight"]
    transformer.load_state_dict(weights | {"patch_embedding.weight": patch})


def learning_rate(step: int, steps: int) -> float:
    """Factor of the learning rates: warm-up, constant, then linear to nothing."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def make_optimizers(transformer: WanTransformer3DModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms, biases, the output and LoRAs."""
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    matrices = [
        p
        for name, p in trained.items()
        if name.startswith("blocks.") and p.ndim == 2 and "lora_" not in name
    ]
    others = [p for p in trained.values() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0)
    return [*([Muon(matrices, lr=MUON_LR)] if matrices else []), adamw]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What one step learns from, BATCH of each."""

    x0: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    text: torch.Tensor
    condition: torch.Tensor | None


def fit(
    transformer: WanTransformer3DModel,
    examples: Callable[[int], Examples],
    *,
    steps: int,
    rate: float,
    ema_decay: float,
    checkpoint: Path,
    export: Callable[[WanTransformer3DModel], None],
) -> None:
    """Train until `steps`, from `checkpoint` if it is there; every EXPORT_EVERY steps it is
    written, and `export` gets a copy of the averaged weights. `rate`: factor of the rates."""
    compiled = torch.compile(transformer)  # the same weights; a tenth faster, after a minute
    ema = copy.deepcopy(transformer).requires_grad_(False)
    optimizers = make_optimizers(transformer)
    rates = [rate * one.param_groups[0]["lr"] for one in optimizers]

    first = 0
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
        batch = examples(step)
        level = batch.sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * batch.x0 + level * batch.noise
        predicted = velocity(compiled, noisy, batch.sigma, batch.text, batch.condition)
        loss = (predicted - (batch.noise - batch.x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            decay = min(ema_decay, (step + 1) / (step + 10))
            for average, weight in zip(ema.parameters(), transformer.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

        running += loss.item()
        if (step + 1) % 100 == 0:
            elapsed = time.monotonic() - began
            print(f"step {step + 1} loss {running / 100:.4f} {elapsed:.0f} s", flush=True)
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
            export(copy.deepcopy(ema))


def stratified(generator: torch.Generator) -> torch.Tensor:
    """One u in each of BATCH equal parts of 0..1."""
    return (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH


def train(mode: str, steps: int, clips: int, work: Path) -> None:
    """Train until `steps`, writing shared/toy/MODE/transformer every EXPORT_EVERY steps."""
    text = embed_captions([*CAPTIONS, ""], TOY / "common")  # [61, tokens, 64]
    latents = cached_latents(clips, False, work)
    conditions = cached_latents(clips, True, work) if mode == "i2v" else None

    torch.manual_seed(0)
    transformer = toy_transformer(mode)
    if mode == "i2v":
        start_from_t2v(transformer)
    attend_to_padding(transformer, text.shape[1])

    def examples(step: int) -> Examples:
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(clips, (BATCH,), generator=generator)
        captions = picks % len(CAPTIONS)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        captions[dropped] = len(CAPTIONS)
        sigma = timestep_shift(stratified(generator), SHIFT)
        x0 = latents[picks].float()
        return Examples(
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            sigma=sigma,
            text=text[captions],
            condition=None if conditions is None else with_mask(conditions[picks].float()),
        )

    fit(
        transformer,
        examples,
        steps=steps,
        rate=1.0,
        ema_decay=EMA_DECAY,
        checkpoint=work / f"{mode}.pt",
        export=lambda ema: save_component(ema, TOY / mode / "transformer"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["t2v", "i2v"])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--clips", type=int, default=6000, help="renders in the latent cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/toy"), help="cache, checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.mode, args.steps, args.clips, args.work)


if __name__ == "__main__":
    main()
