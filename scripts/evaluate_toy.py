"""Sample from the toy transformers in shared/toy and let the oracle count what is right.

python scripts/evaluate_toy.py t2v --sheet /tmp/t2v.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from init_toy_model import LATENT_CHANNELS, TOY
from oracle import judge, matching
from render_clips import CAPTIONS, parse_caption, render_clip
from toy_sampling import (
    attend_to_padding,
    decode_clips,
    embed_captions,
    normalise,
    sample,
    step_levels,
    with_mask,
)
from train_toy_vae import HELD_OUT_SEED, encode_moments, to_pixels

LATENT_SHAPE = (5, 8, 8)
FORTY_STEPS = [1 - step / 40 for step in range(40)]
FOUR_STEPS = [1.0, 0.75, 0.5, 0.25]
# name: (raw steps, shift, guidance, re-noise between the steps)
SETTINGS: dict[str, tuple[list[float], float, float, bool]] = {
    "40 steps, CFG 3": (FORTY_STEPS, 5, 3, False),
    "40 steps, CFG 1.5": (FORTY_STEPS, 5, 1.5, False),
    "40 steps": (FORTY_STEPS, 5, 1, False),
    "4 steps, CFG 3": (FOUR_STEPS, 5, 3, False),
    "4 steps": (FOUR_STEPS, 5, 1, False),
    "4 steps, CFG 3, re-noised": (FOUR_STEPS, 5, 3, True),
    "4 steps, re-noised": (FOUR_STEPS, 5, 1, True),
    "4 steps, re-noised, shift 12": (FOUR_STEPS, 12, 1, True),
}


def contact_sheet(clips: np.ndarray, path: Path, columns: int = 4) -> None:
    """First, middle and last frame of clips, uint8 [N, T, H, W, 3], as one PNG."""
    from PIL import Image

    middle, last = clips.shape[1] // 2, clips.shape[1] - 1
    strips = [np.concatenate([clip[0], clip[middle], clip[last]], axis=1) for clip in clips]
    rows = len(strips) // columns
    grid = [np.concatenate(strips[row * columns : (row + 1) * columns], 1) for row in range(rows)]
    image = Image.fromarray(np.concatenate(grid))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def report(name: str, clips: np.ndarray, captions: list[str], seconds: float) -> None:
    """Print the share that is right: in all, and in colour, shape and motion alone."""
    verdicts = [judge(clip) for clip in clips]
    seen = np.array([(v.colour, v.shape, v.motion) for v in verdicts], dtype=object)
    parts = (seen == np.array([parse_caption(c) for c in captions], dtype=object)).mean(axis=0)
    print(
        f"{name}: {matching(verdicts, captions):.3f} "
        f"(colour {parts[0]:.2f} shape {parts[1]:.2f} motion {parts[2]:.2f}) {seconds:.0f} s",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["t2v", "i2v"])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--sheet", type=Path, help="PNG; the setting's number is added")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    vae = AutoencoderKLWan.from_pretrained(TOY / "common" / "vae")
    transformer = WanTransformer3DModel.from_pretrained(TOY / args.mode / "transformer")
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(args.count)]
    text = embed_captions([*CAPTIONS, ""], TOY / "common")  # [61, tokens, 64]
    attend_to_padding(transformer, text.shape[1])
    condition = None
    if args.mode == "i2v":
        seeds = [HELD_OUT_SEED + 1000 * args.seed + i for i in range(args.count)]
        clips = [render_clip(c, s) for c, s in zip(captions, seeds, strict=True)]
        pixels = to_pixels(np.stack(clips))
        pixels[:, :, 1:] = 0
        raw = torch.cat([encode_moments(vae, one[None]) for one in pixels])
        condition = with_mask(normalise(raw[:, :LATENT_CHANNELS], vae))

    for number, name in enumerate(args.settings):
        raw_steps, shift, guidance, renoise = SETTINGS[name]
        began = time.monotonic()
        latents = sample(
            transformer,
            text[torch.arange(args.count) % len(CAPTIONS)],
            text[-1:],
            step_levels(raw_steps, shift),
            guidance,
            LATENT_SHAPE,
            condition,
            renoise,
            args.seed,
        )
        clips = decode_clips(latents, vae)
        report(name, clips, captions, time.monotonic() - began)
        if args.sheet:
            contact_sheet(clips, args.sheet.with_stem(f"{args.sheet.stem}-{number}"))


if __name__ == "__main__":
    main()
