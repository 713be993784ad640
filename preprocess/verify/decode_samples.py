"""Samples of a cache through the VAE, back to pictures that can be looked at and measured.

What the VAE gives back is compared with the frames that it was given: PSNR of uint8 RGB. Whether
these are the right frames of a video is asked of another decoder, see `preprocess.verify.shown`.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console

from preprocess.dataset.recorded_clips import clip_of, same_content
from preprocess.encode.fingerprint import fields_in_cache, refuse_other_vae
from preprocess.frames.media_info import ANIMATIONS, MediaError
from preprocess.media.decode import digest, fitted_frames
from preprocess.media.remote import DataDir
from preprocess.media.tars import base_folder, media_named
from preprocess.media.worker_pool import WorkerPool, default_workers
from preprocess.verify.findings import Finding
from preprocess.verify.shown import other_frames, shown_by_ffmpeg
from shared.cli.console import bar
from shared.cli.support import say
from shared.device import take_device
from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, CacheIndex, MemberReader, open_cache
from shared.format.schema import DTYPES, LATENTS_MEMBER, seconds_of
from shared.io.mp4 import write_mp4
from shared.io.names import quoted
from shared.io.store import Store
from shared.models.spec import read_model_spec, resolve_model

if TYPE_CHECKING:
    from preprocess.encode.encoders import LatentEncoder

PSNR_FLOOR = 20.0
"""dB. Wan's VAEs give over 30 on most clips; below this the picture is another one."""
_DEFAULT_FPS = 16.0


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """One `wanprep verify --decode`."""

    shards: Store
    model: str
    """A model with the VAE that encoded the cache."""
    data_dir: DataDir
    """What the names in the cache are relative to."""
    output: Path
    count: int
    """How many samples are drawn; beside those of `keys`."""
    keys: tuple[str, ...]
    seed: int
    device: str
    decode_timeout: float

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"--decode: {self.count} samples are too few; expected 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One sample, decoded."""

    key: str
    source: str
    path: Path
    """An mp4; a PNG of an image."""
    psnr: float | None
    """dB over all frames; None where there was nothing to compare with."""
    why: str | None
    """Why there was nothing."""
    other_frames: str | None
    """Which of its frames are those of other places in the source; None: none is."""


def decode_samples(config: DecodeConfig, console: Console) -> list[Decoded]:
    """Write what the VAE makes of some samples to `output`; how near it comes to their source.

    Raises UserError for an unknown key, and for a model whose VAE is not the cache's.
    """
    index = open_cache(config.shards)
    rows = _chosen(config, index)
    spec = read_model_spec(resolve_model(config.model, ("vae",)))
    take_device(config.device)
    cure = "Decode with that VAE: set --pretrained-model-name-or-path to a model that has it."
    fields = fields_in_cache(spec, index, console)
    refuse_other_vae(index, spec, fields, cure=cure)
    config.output.mkdir(parents=True, exist_ok=True)
    if not rows:
        return []
    from preprocess.encode.encoders import LatentEncoder

    dtype = DTYPES[index.fingerprint["latents"]["compute"]]
    done = []
    with (
        bar(console, "decoding samples", len(rows)) as advance,
        WorkerPool(default_workers(), timeout=config.decode_timeout) as pool,
        closing(MemberReader(index)) as reader,
    ):
        vae = LatentEncoder(spec, dtype=dtype, device=config.device)
        vae.tile_if_full(partial(say, console))
        for row in rows:
            done.append(_decode(config, index, row, reader, vae, pool))
            advance()
    return done


def findings(config: DecodeConfig, done: Sequence[Decoded]) -> list[Finding]:
    """What is worth saying of decoded samples: pictures far from their source, sources gone."""
    found = []
    for one in done:
        finding = partial(Finding, file=one.path.name, key=one.key)
        if one.psnr is None and one.other_frames is None:
            found.append(
                finding(
                    severity="note",
                    code="source-missing",
                    found=str(one.why),
                    expected="the file that was encoded",
                    cure="set --train-data-dir to the folder of the media",
                )
            )
        again = f"wanprep remove --shards {quoted(config.shards)} --sample {one.key}"
        cure = f"look at {one.path}; if it is not the source: {again}, then `wanprep encode` again"
        wrong = partial(finding, severity="error", cure=cure)
        if one.other_frames is not None:
            frames = f"{one.source}: {one.other_frames}"
            expected = "each frame where players show it"
            found.append(wrong(code="frames-order", found=frames, expected=expected))
        if one.psnr is not None and one.psnr < PSNR_FLOOR:
            level = f"{one.psnr:.1f} dB against {one.source}"
            found.append(wrong(code="psnr", found=level, expected=f"at least {PSNR_FLOOR:g} dB"))
    return found


def _chosen(config: DecodeConfig, index: CacheIndex) -> list[int]:
    """Rows of the keys that were named, then of those that the seed draws."""
    rows = []
    for wanted in config.keys:
        try:
            key = np.frombuffer(bytes.fromhex(wanted), np.uint8)
            (row,) = np.flatnonzero((index.keys == key).all(axis=1))
        except (ValueError, TypeError):
            raise UserError(
                f"--sample: {wanted!r} is no key of the {len(index)} samples in {config.shards}. "
                "Keys are 32 hex digits; wanprep inspect shows some."
            ) from None
        rows.append(int(row))
    media = np.flatnonzero(index.types != MEDIA_TYPES.index("text"))
    drawn = np.random.default_rng(config.seed).permutation(media)
    return rows + [int(row) for row in drawn if row not in rows][: config.count]


def _decode(
    config: DecodeConfig,
    index: CacheIndex,
    row: int,
    reader: MemberReader,
    vae: "LatentEncoder",
    pool: WorkerPool,
) -> Decoded:
    info = reader.info(row)
    tensors = reader.read(row, LATENTS_MEMBER)
    if tensors is None:
        raise UserError(f"--sample: {index.where(row)} has no latents: it is text-only.")
    frames = vae.frames(tensors["latents"])
    key, source = index.key(row), str(info["source"])
    path = config.output / f"{key}.{'png' if len(frames) == 1 else 'mp4'}"
    if len(frames) == 1:
        Image.fromarray(frames[0]).save(path)
    else:
        seconds = seconds_of(info)
        write_mp4(path, frames, len(frames) / seconds if seconds else _DEFAULT_FPS)
    media_file = media_named(base_folder(config.data_dir), source)
    clip = clip_of(index, row, info)

    def from_media(task: Callable[..., Any], *options: object) -> Any:
        """Raises MediaError where it can't be read."""
        return pool.submit(media_file, task, media_file, *options).result()

    measured, why, others = None, None, None
    try:
        if not same_content({key}, clip, from_media(digest, None)):
            raise MediaError(f"{media_file}: its content is not what was encoded")
        if info["type"] == "video" and PurePosixPath(source).suffix.lower() not in ANIMATIONS:
            shown = from_media(shown_by_ffmpeg, clip.bucket)
            others = other_frames(frames, shown, info, index.fingerprint.get("media", {}))
        taken = list(clip.frame_indices)
        measured = psnr(frames, from_media(fitted_frames, info["type"], taken, clip.bucket))
    except (MediaError, OSError) as error:
        why = str(error)
    return Decoded(key=key, source=source, path=path, psnr=measured, why=why, other_frames=others)


def psnr(frames: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> float:
    """Peak signal to noise of two clips (F, H, W, 3), dB; infinite where they are the same."""
    error = np.square(frames.astype(np.float64) - source.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")
