"""`wantrain decode`: latents of validation through the real VAE, in a process of its own."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from shared.cli import support
from shared.cli.checks import check_writable
from shared.device import chosen_device, take_device
from shared.errors import UserError
from shared.format.schema import DTYPES
from shared.io.hashing import FileHasher
from shared.io.mp4 import Clip, write_mp4
from shared.models import weights
from shared.models.digest import component_digest
from shared.models.pixels import latents_to_frames, tile_if_full
from shared.models.spec import ModelSpec, read_model_spec, resolve_model
from train.sampling.config import DecodeConfig
from train.sampling.contact_sheet import contact_sheet
from train.sampling.latent_files import LatentClip, read_latents


def decode_clips(config: DecodeConfig, console: Console) -> list[Path]:
    """Decode every clip; write mp4s and a contact sheet. Returns the clips' paths."""
    say = partial(support.say, console)
    files = latent_files(config.latents)
    clips = [read_latents(path) for _, path in files]
    spec = read_model_spec(resolve_model(config.model, ["vae"]))
    for (_, path), clip in zip(files, clips, strict=True):
        if len(clip.latents) != spec.latent_channels:
            raise UserError(
                f"--latents: {path} has {len(clip.latents)} channels, the VAE of {spec.folder} "
                f"{spec.latent_channels}. Use the model that was trained: --model MODEL."
            )
    device = chosen_device(config.device)
    take_device(device)
    check_writable("--output", config.output)
    _refuse_other_vae(spec, clips)
    vae = load_vae(spec, DTYPES[config.dtype]).to(device)
    tile_if_full(vae, say)
    rows: list[tuple[str, Clip]] = []
    paths = []
    for (name, _), clip in track(list(zip(files, clips, strict=True)), "decode", console=console):
        frames = latents_to_frames(vae, clip.latents, spec)
        paths.append(config.output / f"{name}.mp4")
        write_mp4(paths[-1], frames, config.fps)
        rows.append((clip.label, frames))
        say(f"clip     {paths[-1]}")
    sheet = config.output / "sheet.png"
    contact_sheet(rows).save(sheet)
    say(f"sheet    {sheet}")
    return paths


def latent_files(given: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, file) of every clip; a name tells its folder where several are given."""
    files: list[Path] = []
    for path in given:
        found = sorted(path.rglob("*.safetensors"), key=_in_order) if path.is_dir() else [path]
        if not found:
            raise UserError(
                f"--latents: {path} has no .safetensors files. Expected a folder of validation, "
                "such as output_dir/validation/step-50."
            )
        files += found
    several = len({path.parent for path in files}) > 1
    return [(f"{p.parent.name}-{p.stem}" if several else p.stem, p) for p in files]


def _in_order(path: Path) -> tuple[int, str]:
    """step-50 before step-100."""
    number = path.parent.name.rpartition("-")[2]
    return (int(number) if number.isdigit() else 0, str(path))


def _refuse_other_vae(spec: ModelSpec, clips: Sequence[LatentClip]) -> None:
    """UserError where latents are of another VAE: what came out would pass for what was trained."""
    check = partial(weights.check_component, spec.family, spec.folder)
    own = component_digest(spec.folder, "vae", FileHasher(), check)
    for clip in clips:
        if own is not None and clip.vae != own:
            raise UserError(
                f"--model: the latents are of a VAE with digest {clip.vae[:12]}…, that of "
                f"{spec.folder} is {own[:12]}…. Use the model that the shards were encoded with."
            )


def load_vae(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """The model's VAE. UserError where it can't be loaded."""
    vae = weights.load_component(spec.family, spec.folder, "vae", dtype=dtype)
    return vae.requires_grad_(False)
