"""Draw clips from the toy's teacher or from a distilled student, and measure them.

Two measures: the share of clips that show what their caption says (`scripts/oracle.py`), and the
sliced Wasserstein distance of the latents to those of the teacher at many steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run from a checkout, nothing of it is packaged

import oracle  # noqa: E402
import render_clips  # noqa: E402
import speed_world  # noqa: E402
from toy_sampling import (  # noqa: E402
    attend_to_padding,
    decode_clips,
    embed_captions,
    normalise,
    sample,
    step_levels,
    with_mask,
)
from train_toy_vae import HELD_OUT_SEED, encode_moments, to_pixels  # noqa: E402

from shared.models.toy_model import toy_folder  # noqa: E402

LATENT_SHAPE = (5, 8, 8)
LATENT_CHANNELS = 16
BATCH = 64  # clips in one transformer pass
PROJECTIONS = 1024
NOISE_SEED = 7_000_000  # far from every seed that the toy was trained with


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How latents are drawn from noise."""

    indices: tuple[float, ...]
    """Raw steps in (0, 1000], before the shift."""
    shift: float
    guidance: float = 1.0
    """CFG scale against the empty prompt; 1 is none."""
    renoise: bool = False
    """Between steps: fresh noise on x̂0 (LCM), else along the velocity (Euler)."""


def even_steps(count: int) -> tuple[float, ...]:
    """`count` raw steps from 1000 down, evenly spaced."""
    return tuple(1000 * (1 - step / count) for step in range(count))


class TwoExperts:
    """Both transformers of a Wan 2.2 model behind the call of one: t ≥ boundary·1000 is high."""

    def __init__(self, high: Any, low: Any, boundary: float) -> None:
        self.high, self.low, self.boundary = high, low, boundary
        self.config = high.config

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        expert = self.high if float(timestep[0]) >= self.boundary * 1000 else self.low
        return expert(x, timestep, *args, **kwargs)


def merge_lora(
    transformer: torch.nn.Module, weights: Mapping[str, torch.Tensor], scale: float
) -> None:
    """W += scale·B·A in place, for tensors under a checkpoint's names ("….lora_A.weight")."""
    for name in weights:
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        up, down = weights[f"{module}.lora_B.weight"], weights[name]
        target = transformer.get_parameter(f"{module}.weight")
        target.data += (scale * (up.double() @ down.double())).to(target.dtype)


@dataclass(frozen=True, kw_only=True)
class World:
    """What the clips of a toy show."""

    captions: tuple[str, ...]
    render: Callable[[str, int], np.ndarray]
    """(caption, seed) → uint8 RGB [T, H, W, 3]."""
    right: Callable[[np.ndarray, str], bool]
    """Whether a clip shows all that its caption says."""


PLAIN = World(
    captions=render_clips.CAPTIONS,
    render=render_clips.render_clip,
    right=lambda clip, caption: oracle.judge(clip, render_clips.ALL_MOTIONS).matches(caption),
)
SPEEDS = World(
    captions=speed_world.CAPTIONS,
    render=speed_world.render_clip,
    right=lambda clip, caption: speed_world.judge(clip) == speed_world.parse_caption(caption),
)
WORLDS = {"toy": PLAIN, "toy-i2v": PLAIN, "toy-experts": SPEEDS, "toy-experts-i2v": SPEEDS}
FASTEST = " fast"  # the captions whose travel is measured


class ToyBench:
    """A toy, a fixed list of captions and their held-out noise (and first frames for i2v)."""

    def __init__(self, model: str, count: int, captions: Sequence[str] | None = None) -> None:
        self.folder, self.world = toy_folder(model), WORLDS[model]
        captions = captions or self.world.captions
        index = json.loads((self.folder / "model_index.json").read_text())
        self.boundary = float(index["boundary_ratio"])
        self.captions = [captions[i % len(captions)] for i in range(count)]
        self._vae = AutoencoderKLWan.from_pretrained(self.folder / "vae")
        embedded = embed_captions([*captions, ""], self.folder)
        self.text = embedded[torch.arange(count) % len(captions)]
        self.empty = embedded[-1:]
        self._condition = self._first_frames() if model.endswith("i2v") else None

    @torch.no_grad()
    def _first_frames(self) -> torch.Tensor:
        """i2v conditions of held-out renders, with their mask: [N, 20, T, h, w]."""
        conditions = []
        for number, caption in enumerate(self.captions):
            pixels = to_pixels(self.world.render(caption, HELD_OUT_SEED + number)[None])
            pixels[:, :, 1:] = 0
            raw = encode_moments(self._vae, pixels)[:, :LATENT_CHANNELS]
            conditions.append(with_mask(normalise(raw, self._vae)))
        return torch.cat(conditions)

    def transformer(
        self, lora: tuple[Path, float] | None = None, expert: str = "high"
    ) -> WanTransformer3DModel:
        """The toy's transformer of an expert, with a LoRA (file, scale) merged."""
        part = "transformer_2" if expert == "low" else "transformer"
        transformer = WanTransformer3DModel.from_pretrained(self.folder / part)
        attend_to_padding(transformer, self.text.shape[1])
        if lora is not None:
            merge_lora(transformer, load_file(lora[0]), lora[1])
        return transformer

    def both(self, loras: Mapping[str, tuple[Path, float]]) -> TwoExperts:
        """Both experts, each with its LoRA, or with that of "full", if there is one."""
        high, low = (
            self.transformer(loras.get(expert, loras.get("full")), expert)
            for expert in ("high", "low")
        )
        return TwoExperts(high, low, self.boundary)

    def draw(self, transformer: Any, sampler: Sampler, seed: int) -> torch.Tensor:
        """Latents for every caption: float32 [N, 16, 5, 8, 8]. Equal seeds, equal noise."""
        raw = [index / 1000 for index in sampler.indices]
        drawn = []
        for start in range(0, len(self.captions), BATCH):
            part = slice(start, start + BATCH)
            drawn.append(
                sample(
                    transformer,
                    self.text[part],
                    self.empty,
                    step_levels(raw, sampler.shift),
                    sampler.guidance,
                    LATENT_SHAPE,
                    None if self._condition is None else self._condition[part],
                    sampler.renoise,
                    NOISE_SEED + 1000 * seed + start // BATCH,
                )
            )
        return torch.cat(drawn)

    def seen(self, latents: torch.Tensor) -> dict[str, float]:
        """What the decoded clips [N ≤ captions, ...] show.

        `accuracy`: the share that shows all that its caption says. `travel`: how far the objects of
        captions that end in "fast" go, in pixels, on average (nan where no caption does).
        """
        right, travel = [], []
        for start in range(0, len(latents), BATCH):
            clips = decode_clips(latents[start : start + BATCH], self._vae)
            for clip, caption in zip(clips, self.captions[start:], strict=False):
                right.append(self.world.right(clip, caption))
                if caption.endswith(FASTEST):
                    travel.append(speed_world.travel_of(clip))
        went = [way for way in travel if way is not None]
        return {
            "accuracy": float(np.mean(right)),
            "travel": float(np.mean(went)) if went else float("nan"),
        }

    def accuracy(self, latents: torch.Tensor) -> float:
        """Share of the clips that show all that their captions say."""
        return self.seen(latents)["accuracy"]


def deviations(latents: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Standard deviations of latents [N, ...], each over all their entries.

    `contrast`: of all entries about their mean. `within`: between clips of one caption, how much
    they differ (variety). `between`: between the means of captions, without what `within` adds to
    them by chance. Of a mixture, per entry: variance = within² + between² (analysis of variance
    with n clips for each caption; E[variance of means] = between² + within² / n).
    """
    clips = latents.flatten(1).double()
    names = sorted(set(captions))
    groups = [clips[[i for i, c in enumerate(captions) if c == name]] for name in names]
    groups = [group for group in groups if len(group) > 1]
    within = torch.stack([group.var(dim=0) for group in groups]).mean()
    means = torch.stack([group.mean(dim=0) for group in groups])
    chance = torch.stack([group.var(dim=0).mean() / len(group) for group in groups]).mean()
    between = (means.var(dim=0).mean() - chance).clamp_min(0)
    return {
        "contrast": float(clips.std()),
        "within": float(within.sqrt()),
        "between": float(between.sqrt()),
    }


def sliced_wasserstein(
    one: torch.Tensor, other: torch.Tensor, *, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance of two samples of equal size [N, ...].

    The root of the mean over random unit directions of the squared distance of the sorted
    projections (Bonneel et al. 2015, Sliced and Radon Wasserstein Barycenters of Measures).
    Moving a sample by a vector gives the root mean square of the vector's entries.
    """
    a, b = one.flatten(1).double(), other.flatten(1).double()
    assert a.shape == b.shape
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    gaps = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return float(gaps.square().mean().sqrt())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over independent runs; the error of a single run is nan."""
    tensor = torch.tensor(values, dtype=torch.float64)
    error = tensor.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))
    return float(tensor.mean()), float(error)
