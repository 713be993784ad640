"""How fast this machine encoded before: a small memo that `wanprep plan` foretells times from."""

import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from preprocess.encode.config import EncodeConfig
from preprocess.encode.passes import Times
from shared.format.fingerprint import Fingerprint
from shared.io.hashing import cache_folder, digest_of
from shared.io.memo import note, recall

MEGAPIXEL, CAPTION = "megapixel", "caption"
"""What is counted: pixels of all frames that go through the VAE; captions."""
_LAST = 8  # of so many runs the memo counts; older ones were perhaps another driver's


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds for each unit; None where nothing was measured."""

    megapixel: float | None
    caption: float | None


def remember_speed(config: EncodeConfig, fingerprint: Fingerprint, times: Times) -> None:
    """Note how long the two passes of a run took. What cannot be written is not noted."""
    records = [
        {"what": what, "by": _by(what, config, fingerprint), "units": units, "seconds": seconds}
        for what, units, seconds in (
            (MEGAPIXEL, times.pixels / 1e6, times.media_seconds),
            (CAPTION, times.captions, times.caption_seconds),
        )
        if units
    ]
    note(_memo(), records)


def known_speed(config: EncodeConfig, fingerprint: Fingerprint) -> Speed:
    """What the last runs on this machine with these encoders and this device took."""
    return Speed(
        megapixel=_known(_by(MEGAPIXEL, config, fingerprint)),
        caption=_known(_by(CAPTION, config, fingerprint)),
    )


def _memo() -> Path:
    return cache_folder() / "speed.jsonl"


def _by(what: str, config: EncodeConfig, fingerprint: Fingerprint) -> str:
    """All that a speed depends on but the amount of work."""
    encoder = (
        [fingerprint["latents"]["vae"], config.vae_dtype, fingerprint["mode"]]
        if what == MEGAPIXEL
        else [fingerprint["text"]["encoder"], config.text_encoder_dtype]
    )
    return digest_of([what, platform.node(), _processor(config.device), *encoder])[:32]


def _processor(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)


def _known(by: str) -> float | None:
    """Seconds for a unit over the last runs; a damaged line counts for nothing."""
    found: list[tuple[float, float]] = []
    for record in recall(_memo()):
        with suppress(ValueError, KeyError, TypeError):
            if record["by"] == by and record["units"] > 0 and record["seconds"] > 0:
                found.append((float(record["units"]), float(record["seconds"])))
    last = found[-_LAST:]
    return sum(s for _, s in last) / sum(u for u, _ in last) if last else None
