"""What latents look like without a VAE: a linear map from a latent cell to its RGB colour.

The map is fitted while a cache is encoded, when frames and latents are both at hand: each latent
cell should give the mean colour of the pixels that it stands for. What the least squares need are
sums over cells, so memory is constant, sums of shards and writers can be added in any order, and
every sidecar keeps those of its own shard. One sample in four is held out; its sums tell how good
the map is (R²).
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.format.strict_json import is_count

HOLD_OUT = 4
"""One sample in so many, chosen by its key, is kept from the fit."""
R2_FLOOR = 0.5
"""Below this held-out R² previews mislead, and commands that show them say so."""

_COLOURS = 3
# Singular values of XᵀX below this share of the largest are noise of the sums (float64).
_RCOND = 1e-12
# Sums of more cells than anyone has; products of two are still finite.
_MOST_SUM = 1e100

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ColourSums:
    """Sums over latent cells for least squares of y (RGB in [−1, 1]) on x (C latents and a 1)."""

    samples: int
    """Clips and images that the cells are from."""
    xx: Array
    """(C+1, C+1), Σ x xᵀ; the last entry is the number of cells."""
    xy: Array
    """(C+1, 3), Σ x yᵀ."""
    yy: Array
    """(3,), Σ y²."""

    @classmethod
    def none(cls, channels: int) -> "ColourSums":
        """Sums over nothing."""
        size = channels + 1
        return cls(0, np.zeros((size, size)), np.zeros((size, _COLOURS)), np.zeros(_COLOURS))

    @classmethod
    def of(cls, frames: npt.NDArray[np.uint8], latents: torch.Tensor) -> "ColourSums":
        """Sums of one sample: frames (F, H, W, 3) RGB and its latents (C, T, h, w)."""
        _, *grid = latents.shape
        y = latent_pixel_colours(frames, tuple(grid)).reshape(-1, _COLOURS)
        x = latents.detach().cpu().double().numpy().reshape(len(latents), -1)
        x = np.concatenate([x, np.ones((1, x.shape[1]))])
        return cls(1, x @ x.T, x @ y, np.square(y).sum(axis=0))

    def __add__(self, other: "ColourSums") -> "ColourSums":
        samples = self.samples + other.samples
        return ColourSums(samples, self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    @property
    def cells(self) -> int:
        return round(float(self.xx[-1, -1]))

    def to_json(self) -> dict[str, Any]:
        """`sums`: base64 of little-endian float64: upper triangle of `xx`, then `xy`, then `yy`."""
        upper = self.xx[np.triu_indices(len(self.xx))]
        values = np.concatenate([upper, self.xy.ravel(), self.yy]).astype("<f8")
        return {"samples": self.samples, "sums": base64.b64encode(values.tobytes()).decode()}

    @classmethod
    def from_json(cls, value: Any) -> "ColourSums":
        """Raises ValueError for anything that `to_json` does not write."""
        try:
            samples, text = value["samples"], value["sums"]
            numbers = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")
        except (KeyError, TypeError, binascii.Error) as error:
            raise ValueError(f"no sums of colours: {error}") from error
        if not is_count(samples):
            raise ValueError(f"samples is {samples!r:.40}")
        if not bool((np.abs(numbers) < _MOST_SUM).all()):  # NaN is not below
            raise ValueError("sums of colours hold numbers that no sums are")
        # n numbers = size·(size+1)/2 + 3·size + 3, with size = channels + 1.
        size = round((-7 + (49 + 8 * (len(numbers) - _COLOURS)) ** 0.5) / 2) if len(numbers) else 0
        triangle = size * (size + 1) // 2
        if size < 1 or triangle + _COLOURS * size + _COLOURS != len(numbers):
            raise ValueError(f"sums of colours hold {len(numbers)} numbers, which fit no size")
        xx = np.zeros((size, size))
        xx[np.triu_indices(size)] = numbers[:triangle]
        xx = xx + np.triu(xx, 1).T
        return cls(samples, xx, numbers[triangle:-_COLOURS].reshape(size, _COLOURS), numbers[-3:])


@dataclass(frozen=True)
class ColourFit:
    """Sums of the samples that the map is fitted to, and of those that judge it."""

    fit: ColourSums
    held_out: ColourSums

    @classmethod
    def of(cls, key: str, sums: ColourSums) -> "ColourFit":
        """One sample's sums, on the side that its key decides."""
        nothing = ColourSums.none(len(sums.xx) - 1)
        return cls(nothing, sums) if is_held_out(key) else cls(sums, nothing)

    def __add__(self, other: "ColourFit") -> "ColourFit":
        return ColourFit(self.fit + other.fit, self.held_out + other.held_out)

    def to_json(self) -> dict[str, Any]:
        """The sidecar's `latent_rgb`."""
        return {"fit": self.fit.to_json(), "held_out": self.held_out.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> "ColourFit":
        """Raises ValueError for anything that `to_json` does not write."""
        try:
            fit, held_out = (ColourSums.from_json(value[side]) for side in ("fit", "held_out"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no sums of colours: {error}") from error
        if len(fit.xx) != len(held_out.xx):
            raise ValueError("sums of colours of two numbers of channels")
        return cls(fit, held_out)


@dataclass(frozen=True, kw_only=True)
class LatentRgb:
    """RGB in [−1, 1] = latents · weight + bias, for normalised latents."""

    weight: Array
    """(C, 3)."""
    bias: Array
    """(3,)."""
    r2: float | None
    """Share of the colours' variance that it explains on held-out samples; None: none held out."""
    samples: int
    """That it was fitted to."""
    held_out: int
    """Samples that `r2` was measured on."""

    def to_json(self) -> dict[str, Any]:
        """The manifest's `latent_rgb`."""
        return {**vars(self), "weight": self.weight.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_json(cls, value: Any) -> "LatentRgb":
        """Raises KeyError, TypeError or ValueError for anything that `to_json` does not write."""
        weight, bias = np.array(value["weight"], float), np.array(value["bias"], float)
        if weight.ndim != 2 or weight.shape[1] != _COLOURS or bias.shape != (_COLOURS,):
            raise ValueError(f"latent_rgb has shapes {weight.shape} and {bias.shape}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("latent_rgb holds infinite numbers")
        r2 = value["r2"]
        return cls(
            weight=weight,
            bias=bias,
            r2=None if r2 is None else float(r2),
            samples=int(value["samples"]),
            held_out=int(value["held_out"]),
        )


def is_held_out(key: str) -> bool:
    """Whether the sample judges the map instead of shaping it: a function of only its key."""
    return int(key[:8], 16) % HOLD_OUT == 0


def latent_pixel_colours(frames: npt.NDArray[np.uint8], grid: tuple[int, ...]) -> Array:
    """Mean colour of the pixels of each latent cell: (T, h, w, 3) in [−1, 1].

    `frames` (F, H, W, 3); `grid` is (T, h, w). The VAE is causal: the first latent frame stands
    for the first frame, each later one for the next (F − 1)/(T − 1) frames.
    """
    count, height, width, _ = frames.shape
    times, rows, columns = grid
    down, across = height // rows, width // columns
    length = (count - 1) // (times - 1) if times > 1 else 1
    assert (count, height, width) == (1 + (times - 1) * length, rows * down, columns * across)
    colours = np.empty((times, rows, columns, _COLOURS))
    for time in range(times):
        first = 0 if time == 0 else 1 + (time - 1) * length
        last = first + (1 if time == 0 else length)
        # Exact integers, in steps whose inner loops run over whole lines of pixels.
        summed = frames[first:last].sum(axis=0, dtype=np.uint16)
        summed = summed.reshape(rows, down, width * _COLOURS).sum(axis=1, dtype=np.uint32)
        cells = summed.reshape(rows, columns, across, _COLOURS).sum(axis=2, dtype=np.uint32)
        colours[time] = cells / ((last - first) * down * across * 255 / 2) - 1
    return colours


def solve(parts: Iterable[ColourFit]) -> LatentRgb | None:
    """The map of least squared error over all parts; None where no frame was ever seen.

    With so few samples that none (or all) are held out, all are fitted and R² is unknown.
    Raises ValueError where parts have another number of channels.
    """
    total: ColourFit | None = None
    for part in parts:
        if total is not None and len(part.fit.xx) != len(total.fit.xx):
            raise ValueError(
                f"sums of colours of {len(part.fit.xx) - 1} and {len(total.fit.xx) - 1} channels"
            )
        total = part if total is None else total + part
    if total is None or not (total.fit.cells or total.held_out.cells):
        return None
    fit, held_out = total.fit, total.held_out
    if not fit.cells:
        fit, held_out = held_out, fit
    # Symmetric and perhaps singular (grey pictures): the smallest solution.
    weights: Array = np.linalg.lstsq(fit.xx, fit.xy, rcond=_RCOND)[0].astype(np.float64)
    return LatentRgb(
        weight=weights[:-1],
        bias=weights[-1],
        r2=_r2(held_out, weights),
        samples=fit.samples,
        held_out=held_out.samples,
    )


def _r2(sums: ColourSums, weights: Array) -> float | None:
    """1 − squared error / squared distance from the mean colour, over all three colours."""
    if not sums.cells:
        return None
    error = np.sum(sums.yy) - 2 * np.sum(weights * sums.xy) + np.sum(weights * (sums.xx @ weights))
    spread = np.sum(sums.yy - np.square(sums.xy[-1]) / sums.cells)
    r2 = float(1 - error / spread) if spread > 0 else np.nan
    return r2 if np.isfinite(r2) else None


def latents_to_rgb(latents: torch.Tensor, rgb: LatentRgb) -> npt.NDArray[np.uint8]:
    """Normalised latents (C, T, h, w) → frames (T, h, w, 3) uint8, one pixel a latent cell.

    A preview for people: colours and layout, no detail. Raises ValueError where the number of
    channels is not the map's.
    """
    if latents.ndim != 4 or len(latents) != len(rgb.weight):
        raise ValueError(
            f"latents of shape {tuple(latents.shape)}, the map is for ({len(rgb.weight)}, T, h, w)"
        )
    weight = torch.from_numpy(rgb.weight).float().to(latents.device)
    bias = torch.from_numpy(rgb.bias).float().to(latents.device)
    colours = torch.einsum("cthw,cr->thwr", latents.detach().float(), weight) + bias
    levels = ((colours + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).cpu().numpy()
