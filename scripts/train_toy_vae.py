"""Train the toy Wan VAE on renders of the synthetic world (and a few photographs).

The recipe: Muon on the convolutions, AdamW on the rest, a moving average of the weights, first
small crops that follow the object, then whole frames. Everything runs through the causal cache
as two chunks (frame 0, then the rest), which computes the same as `vae.encode`/`vae.decode` do
and is faster; `feat_cache=None` would be another network, without temporal resampling.

    python scripts/train_toy_vae.py train --steps 3400
    python scripts/train_toy_vae.py polish --steps 1500     # the decoder alone
    python scripts/train_toy_vae.py measure

`polish` leaves the latents as they are, so a transformer trained on them stays valid. Both resume
from their own checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResidualBlock,
    patchify,
    unpatchify,
)
from init_toy_model import TOY, save_component, toy_vae
from muon import Muon
from render_clips import CAPTIONS, render_clip

BATCH = 4
WARMUP_STEPS = 100
EMA_DECAY = 0.995
# Of Muon and AdamW.
RATES = {"train": (2e-2, 2e-3), "polish": (1e-2, 1e-3)}
KL_WEIGHT = 1e-5
PHOTO_SHARE = 0.1
HELD_OUT_SEED = 10_000_000  # training seeds stay below


# ---------------------------------------------------------------- the causal VAE as two chunks


def encode_moments(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, 1+4k, H, W] in -1..1 to mean and log-variance [B, 2*16, 1+k, H/8, W/8]."""
    patches = patchify(pixels, patch_size=vae.config.patch_size)
    vae.clear_cache()
    cache = vae._enc_feat_map
    hidden = vae.encoder(patches[:, :, :1], feat_cache=cache, feat_idx=[0])
    if patches.shape[2] > 1:
        rest = vae.encoder(patches[:, :, 1:], feat_cache=cache, feat_idx=[0])
        hidden = torch.cat([hidden, rest], dim=2)
    vae.clear_cache()
    return vae.quant_conv(hidden)


def decode_pixels(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents [B, 16, 1+k, h, w] to pixels [B, 3, 1+4k, 8h, 8w], not clamped to -1..1."""
    hidden = vae.post_quant_conv(latents)
    vae.clear_cache()
    cache = vae._feat_map
    first = vae.decoder(hidden[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    if hidden.shape[2] > 1:
        rest = vae.decoder(hidden[:, :, 1:], feat_cache=cache, feat_idx=[0])
        first = torch.cat([first, rest], dim=2)
    vae.clear_cache()
    return unpatchify(first, patch_size=vae.config.patch_size)


# ---------------------------------------------------------------------------------------- data


def to_pixels(clips: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] to float32 [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous().float() / 127.5 - 1


def photo_clip(photos: list[np.ndarray], rng: np.random.Generator, frames: int, side: int):
    """A slow pan over a photograph: uint8 [T, side, side, 3]."""
    photo = photos[rng.integers(len(photos))]
    reach = np.array(photo.shape[:2]) - side
    start = rng.integers(0, reach + 1)
    end = np.clip(start + rng.integers(-24, 25, size=2), 0, reach)
    corners = np.rint(np.linspace(start, end, frames)).astype(int)
    return np.stack([photo[y : y + side, x : x + side] for y, x in corners])


def load_photos() -> list[np.ndarray]:
    """Photographs that come with scikit-image, reduced: uint8 [H, W, 3] each."""
    from PIL import Image
    from skimage import data

    photos = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(data, name)()[..., :3])
        photos.append(np.asarray(image.resize((256, 192), Image.Resampling.LANCZOS)))
    return photos


def object_crop(clip: np.ndarray, rng: np.random.Generator, frames: int, side: int) -> np.ndarray:
    """A window of `frames` frames and `side` pixels that holds (part of) the object.

    The object is most of what matters and little of the frame, so small crops learn faster.
    """
    start = rng.integers(0, len(clip) - frames + 1)
    clip = clip[start : start + frames]
    chroma = np.ptp(clip[frames // 2].astype(np.int16), axis=-1)
    ys, xs = np.nonzero(chroma > 60)
    pick = rng.integers(len(ys))
    limit = np.array(clip.shape[1:3]) - side
    y, x = np.clip(np.array([ys[pick], xs[pick]]) - side // 2, 0, limit)
    return clip[:, y : y + side, x : x + side]


def stage(progress: float) -> tuple[int, int]:
    """(frames, side in pixels) of a training crop. Short clips alone spoil the late frames."""
    if progress < 0.2:
        return 9, 32
    return (17, 32) if progress < 0.6 else (17, 64)


def make_batch(step: int, progress: float, photos: list[np.ndarray]) -> torch.Tensor:
    """The batch of a step, a pure function of it: float32 [B, 3, T, H, W] in -1..1."""
    rng = np.random.default_rng([7, step])
    frames, side = stage(progress)
    clips = []
    for _ in range(BATCH):
        if rng.random() < PHOTO_SHARE:
            clips.append(photo_clip(photos, rng, frames, side))
        else:
            caption = CAPTIONS[rng.integers(len(CAPTIONS))]
            clip = render_clip(caption, int(rng.integers(HELD_OUT_SEED)))
            clips.append(object_crop(clip, rng, frames, side))
    return to_pixels(np.stack(clips))


def held_out(count: int) -> np.ndarray:
    """Renders of captions in turn that training never sees: uint8 [count, 17, 64, 64, 3]."""
    return np.stack([render_clip(CAPTIONS[(7 * i) % 60], HELD_OUT_SEED + i) for i in range(count)])


# ----------------------------------------------------------------------------------- training


def initialise(vae: AutoencoderKLWan) -> None:
    """Residual branches start as nothing, the posterior starts narrow (log-variance -6)."""
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    z_dim = vae.config.z_dim
    with torch.no_grad():
        vae.quant_conv.weight[z_dim:] = 0
        vae.quant_conv.bias[z_dim:] = -6


def sample_posterior(vae: AutoencoderKLWan, pixels: torch.Tensor, generator: torch.Generator):
    """Latents drawn from the posterior of pixels, and the KL divergence of it per element."""
    mean, logvar = encode_moments(vae, pixels).chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=generator)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return mean + (0.5 * logvar).exp() * noise, kl


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Error of pixels [B, 3, T, H, W], weighted towards objects and the ends of the clip."""
    chroma = pixels.amax(dim=1, keepdim=True) - pixels.amin(dim=1, keepdim=True)
    weight = 1 + 3 * (chroma > 0.5).float()
    weight[:, :, 0] *= 2
    weight[:, :, -1] *= 1.5
    weight = weight / weight.mean()
    squared = (decoded - pixels).square()
    charbonnier = (squared + 1e-6).sqrt()
    return (weight * (0.5 * charbonnier + squared)).mean()


def learning_rate(step: int, steps: int) -> float:
    """Factor of the learning rates: linear warm-up, then a cosine to nothing."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def psnr_by_frame(vae: AutoencoderKLWan, clips: np.ndarray) -> torch.Tensor:
    """PSNR in dB of each frame over all clips, through vae.encode/vae.decode: float32 [T]."""
    error = []
    for clip in clips:
        pixels = to_pixels(clip[None])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        error.append(((decoded - pixels) / 2).square().mean(dim=(0, 1, 3, 4)))
    return -10 * torch.stack(error).mean(dim=0).log10()


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, count: int = 240) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over `count` clips."""
    latents = []
    for index in range(count):
        clip = render_clip(CAPTIONS[index % 60], 5_000_000 + index)
        mean, _ = encode_moments(vae, to_pixels(clip[None])).chunk(2, dim=1)
        latents.append(mean)
    stacked = torch.cat(latents)
    mean, std = stacked.mean(dim=(0, 2, 3, 4)), stacked.std(dim=(0, 2, 3, 4))
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in std.tolist()]


def train(vae: AutoencoderKLWan, task: str, steps: int, checkpoint: Path) -> AutoencoderKLWan:
    """Train for `steps` (the length of the cosine too); return the averaged weights.

    The task "train" fits all of `vae`, "polish" its decoder.
    """
    if task == "polish":
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    ema = copy.deepcopy(vae).requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    # Convolution kernels are matrices for Muon; gains and biases are vectors and stay with AdamW.
    matrices = [p for p in parameters if p.ndim >= 4 and p.flatten(1).shape[1] > 1]
    others = [p for p in parameters if all(p is not m for m in matrices)]
    rates = RATES[task]
    optimizers = [
        Muon(matrices, lr=rates[0]),
        torch.optim.AdamW(others, lr=rates[1], weight_decay=0.0),
    ]

    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]

    photos = load_photos()
    evaluation = held_out(6)
    began = time.monotonic()
    for step in range(first, steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(step, steps)
        pixels = make_batch(step, step / steps if task == "train" else 1.0, photos)
        latents, kl = sample_posterior(vae, pixels, torch.Generator().manual_seed(step))
        loss = reconstruction_loss(decode_pixels(vae, latents), pixels) + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), vae.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

        if (step + 1) % 100 == 0 or step + 1 == steps:
            psnr = psnr_by_frame(ema, evaluation)
            print(
                f"step {step + 1} loss {loss.item():.4f} psnr {psnr.mean():.2f} "
                f"first {psnr[0]:.2f} last {psnr[-1]:.2f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
            state = {
                "step": step + 1,
                "vae": vae.state_dict(),
                "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["train", "polish", "measure"])
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/toy"), help="for checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    folder = TOY / "common" / "vae"
    if args.task == "train":
        torch.manual_seed(0)
        vae = toy_vae()
        initialise(vae)
        vae = train(vae, args.task, args.steps, args.work / "vae.pt")
        means, stds = measure_latents(vae)
        vae.register_to_config(latents_mean=means, latents_std=stds)
        save_component(vae, folder)
    elif args.task == "polish":
        vae = AutoencoderKLWan.from_pretrained(folder)
        save_component(train(vae, args.task, args.steps, args.work / "vae-polish.pt"), folder)
    vae = AutoencoderKLWan.from_pretrained(folder)
    psnr = psnr_by_frame(vae, held_out(24))
    print(f"{folder}: held-out PSNR {psnr.mean():.2f} dB, worst frame {psnr.min():.2f} dB")


if __name__ == "__main__":
    main()
