"""Where the seconds of a run go; and how fast this machine encoded before: a small memo that
`wanprep plan` foretells times from."""

import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from preprocess.encode.config import EncodeConfig
from shared.format.fingerprint import Fingerprint
from shared.io.hashing import cache_folder, digest_of
from shared.io.memo import note, recall

MEGAPIXEL, CAPTION = "megapixel", "caption"
"""What is counted: pixels of all frames that go through the VAE; captions."""
_LAST = 8  # of so many runs the memo counts; older ones were perhaps another driver's


class Stopwatch:
    """Seconds spent in its `with` blocks so far."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *failure: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass
class Times:
    """Where the seconds of a run went, as the loop saw them. What overlaps is not in here twice."""

    text: Stopwatch = field(default_factory=Stopwatch)
    """In the text encoder, without loading it."""
    captions: int = 0
    """That it took."""
    vae: Stopwatch = field(default_factory=Stopwatch)
    """In the VAE (and CLIP), without loading them."""
    clips: int = 0
    """That it encoded."""
    pixels: int = 0
    """Pixels of all their frames."""
    clip_seconds: float = 0.0
    """In the VAE with them, and waiting for them."""
    decoding: Stopwatch = field(default_factory=Stopwatch)
    """Waiting for a clip to be decoded and resized."""
    decoders: float = 0.0
    """What the clips took the decoders, summed over them; beside the VAE, so mostly hidden."""
    media_began: float = 0.0
    """When the VAE was loaded, by `time.perf_counter`."""


def remember_speed(config: EncodeConfig, fingerprint: Fingerprint, times: Times) -> None:
    """Note how long the two passes of a run took. What cannot be written is not noted."""
    records = [
        {"what": what, "by": _by(what, config, fingerprint), "units": units, "seconds": seconds}
        for what, units, seconds in (
            (MEGAPIXEL, times.pixels / 1e6, times.clip_seconds),
            (CAPTION, times.captions, times.text.seconds),
        )
        if units
    ]
    note(_memo(), records)


def foretold_seconds(
    config: EncodeConfig, fingerprint: Fingerprint, units: Mapping[str, float]
) -> float | None:
    """What so many MEGAPIXELs and CAPTIONs take, as fast as the last runs on this machine with
    these encoders and this device were; None where that is not known."""
    seconds = 0.0
    for what, number in units.items():
        speed = _known(_by(what, config, fingerprint))
        if number and speed is None:
            return None
        seconds += number * (speed or 0.0)
    return seconds


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
