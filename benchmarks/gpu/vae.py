"""The VAE by itself: seconds and peak of encoding and decoding a clip, in each number format."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from gpu.large import A14B, bucket, published
from gpu.place import Place, first_line
from train.tracking.step_log import peak_memory

FORMATS: Mapping[str, tuple[torch.dtype, bool]] = {
    "fp32": (torch.float32, False),
    "fp32, TF32": (torch.float32, True),  # torch's default for convolutions
    "bf16": (torch.bfloat16, True),
}
SIZES = {"480p": (480, 832), "720p": (720, 1280)}


@torch.inference_mode()
def vae(place: Place) -> None:
    """Size, format and direction → seconds and peak bytes; random weights."""
    found: dict[str, Any] = {}
    config = dict(published(place, A14B).vae)
    for size, (height, width) in SIZES.items():
        height, width = (height // 15, width // 13) if place.quick else (height, width)
        height, width = height // 16 * 16, width // 16 * 16
        frames = bucket(place).frames
        for name, (dtype, tf32) in FORMATS.items():
            model = AutoencoderKLWan.from_config(config).to(place.device, dtype).eval()
            pixels = torch.zeros(1, 3, frames, height, width, device=place.device, dtype=dtype)
            latents = torch.zeros(
                1, config["z_dim"], (frames + 3) // 4, height // 8, width // 8,
                device=place.device, dtype=dtype,
            )  # fmt: skip
            work: dict[str, Callable[[], Any]] = {
                "encode": lambda model=model, pixels=pixels: model.encode(pixels),
                "decode": lambda model=model, latents=latents: model.decode(latents),
            }
            for direction, one in work.items():
                found[f"{size} {name} {direction}"] = _measured(place, one, tf32=tf32)
                place.keep({"vae": found})
            if name == "fp32":
                model.enable_tiling()
                one = work["decode"]
                found[f"{size} {name} decode in tiles"] = _measured(place, one, tf32=tf32)
                place.keep({"vae": found})
            del model, work


def _measured(place: Place, work: Callable[[], Any], *, tf32: bool) -> dict[str, Any]:
    device = torch.device(place.device)
    if place.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with _tf32(tf32) if place.on_gpu else nullcontext():
            seconds = place.seconds(work, 1)
    except RuntimeError as error:  # also of a full GPU
        return {"left out": first_line(error)}
    return {"seconds": seconds, "peak": peak_memory(device)}


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
