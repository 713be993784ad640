"""What a cache must hold, derived independently: the brief's rules and diffusers' own pipelines.

Nothing of `preprocess` or `shared` is imported here.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image, ImageOps

# Design brief, section 3.
TABLE = """
[256,1024] [256,992] [256,960] [256,928] [288,896] [288,864] [288,832] [320,800] [320,768]
[352,736] [352,704] [352,672] [384,672] [384,640] [416,608] [416,576] [448,576] [448,544]
[480,544] [480,512] [512,512]
"""


def bucket(height: int, width: int, size: int, multiple: int = 16) -> tuple[int, int]:
    """[height, width] of the bucket at `size`."""
    base = [tuple(map(int, pair.strip("[]").split(","))) for pair in TABLE.split()]
    base += [(w, h) for h, w in base if h != w]
    ranked = sorted(
        base,
        key=lambda hw: (
            round(abs(math.log(hw[0] / hw[1]) - math.log(height / width)), 9),
            abs(math.log(hw[0] / hw[1])),
        ),
    )
    high, wide = ranked[0]
    return (
        math.floor(high * size / 512 / multiple) * multiple,
        math.floor(wide * size / 512 / multiple) * multiple,
    )


def chosen_frames(path: Path, *, stride: int, wanted: int, seed: int) -> list[int]:
    """Frame numbers of the clip, by the rule that shards/README.md states."""
    available = len(decord.VideoReader(str(path)))
    frames = next(
        n for n in range(wanted, 0, -4) if (n - 1) * stride + 1 <= available
    )  # the largest 4n+1 that fits
    places = available - (frames - 1) * stride
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    draw = hashlib.sha256(f"{seed}:{content}:clip start".encode()).hexdigest()
    start = int(draw, 16) % places
    return [start + stride * n for n in range(frames)]


def fitted(frames: list[Image.Image], height: int, width: int) -> list[Image.Image]:
    """Resize to cover (bilinear, antialiased, uint8), centre crop."""
    result = []
    for frame in frames:
        scale = max(height / frame.height, width / frame.width)
        high = max(height, round(frame.height * scale))
        wide = max(width, round(frame.width * scale))
        resized = frame.resize((wide, high), resample=Image.BILINEAR)
        left, top = (wide - width) // 2, (high - height) // 2
        result.append(resized.crop((left, top, left + width, top + height)))
    return result


def video_frames(path: Path, indices: list[int]) -> list[Image.Image]:
    batch = decord.VideoReader(str(path)).get_batch(indices).asnumpy()
    return [Image.fromarray(frame) for frame in batch]


def image_frame(path: Path) -> list[Image.Image]:
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB")]


@dataclass(frozen=True)
class Reference:
    """Float32 tensors as the pipeline computes them."""

    latents: torch.Tensor
    """(C, T, h, w)"""
    condition: torch.Tensor | None
    """i2v, flf2v: (C, T, h, w); ti2v: (C, 1, h, w), of a video"""
    text: torch.Tensor
    """(512, D)"""
    clip: torch.Tensor | None = None
    """Wan 2.1 i2v: (tokens, D); flf2v: (2 · tokens, D)"""
    mask: torch.Tensor | None = None
    """Of i2v, flf2v: (4, T, h, w)"""


class Pipelines:
    """The two pipelines of a model folder, at the dtypes of the encoders under test."""

    def __init__(
        self, folder: Path, mode: str, *, vae: torch.dtype, text_encoder: torch.dtype
    ) -> None:
        cls = WanPipeline if mode == "t2v" else WanImageToVideoPipeline
        dtypes = {"vae": vae, "text_encoder": text_encoder, "default": torch.float32}
        self.mode = mode
        self.pipe = cls.from_pretrained(folder, torch_dtype=dtypes)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def of(self, frames: list[Image.Image], caption: str) -> Reference:
        pipe, vae = self.pipe, self.pipe.vae
        width, height = frames[0].size
        pixels = pipe.video_processor.preprocess_video(frames, height=height, width=width)

        # WanVideoToVideoPipeline.prepare_latents: posterior mode, mean and 1/std in fp32.
        raw = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
        mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
        inverse = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
        latents = (raw - mean) * inverse

        def prepared(first: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
            return pipe.prepare_latents(
                first,
                batch_size=1,
                num_channels_latents=vae.config.z_dim,
                height=height,
                width=width,
                num_frames=len(frames),
                dtype=torch.float32,
                device=torch.device("cpu"),
                last_image=last,
            )[1][0]

        condition, clip, mask, both = None, None, None, self.mode.endswith("flf2v")
        if self.mode.startswith("wan21"):
            clip = pipe.encode_image([frames[0], frames[-1]] if both else frames[0]).flatten(0, 1)
            # The stated exception: an image's embedding would give its target away.
            clip = clip if len(frames) > 1 else torch.zeros_like(clip)
        if self.mode.endswith(("i2v", "flf2v")) and self.mode != "ti2v":
            # The stated exception: an image's condition is the encoding of zeros.
            first, last = pixels[:, :, 0], pixels[:, :, -1]
            if len(frames) == 1:
                first, last, both = torch.zeros_like(first), last, False
            whole = prepared(first, last if both else None)
            mask, condition = whole[:4], whole[4:]  # the mask is rebuilt, not cached
        elif self.mode == "ti2v" and len(frames) > 1:
            condition = prepared(pixels[:, :, 0])
        text, _ = pipe.encode_prompt(
            caption, max_sequence_length=512, do_classifier_free_guidance=False
        )
        return Reference(
            latents=latents[0], condition=condition, text=text[0], clip=clip, mask=mask
        )


def array(frames: list[Image.Image]) -> np.ndarray:
    """(F, H, W, 3) uint8."""
    return np.stack([np.asarray(frame) for frame in frames])
