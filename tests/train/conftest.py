"""Real caches from real mp4 files, made by the real `wanprep encode`, for the tests of training."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

import train.memory.forward_only
from preprocess.cli.app import app as wanprep
from shared.io.mp4 import write_mp4
from train.model.base import load_base

FRAMES = 9


def write_dataset(folder: Path, *, clips: int = 5, image: bool = True) -> Path:
    """Moving gradients as mp4 in two aspect ratios, and a picture; captions beside them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(11)
    for number in range(clips):
        height, width = ((54, 96), (80, 56))[number % 2]
        rows, columns = np.mgrid[0:height, 0:width]
        phase = rng.uniform(0, 6, size=3)
        frames = [
            np.stack(
                [
                    127 + 120 * np.sin(phase[c] + (rows + (c + 1) * columns) / 9 + t / 3)
                    for c in range(3)
                ],
                axis=-1,
            )
            for t in range(FRAMES + number)
        ]
        write_mp4(folder / f"clip{number}.mp4", np.stack(frames).astype(np.uint8), fps=16)
        (folder / f"clip{number}.txt").write_text(f"waves of kind {number}, moving")
    if image:
        picture = rng.integers(0, 255, size=(60, 90, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / "noise.png")
        (folder / "noise.txt").write_text("a picture of noise")
    return folder


def encode(dataset: Path, model: Path, output: Path, *more: str) -> Path:
    """Run `wanprep encode` in this process; the shards' folder."""
    wanprep(
        [
            "encode", "--model", str(model), "--train-data-dir", str(dataset),
            "--output", str(output), "--size", "64", "--video-sample-n-frames", str(FRAMES),
            "--video-sample-stride", "1", "--device", "cpu", *more,
        ],
        standalone_mode=False,
    )  # fmt: skip
    return output


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def t2v_shards(dataset: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(dataset, tiny_t2v, tmp_path_factory.mktemp("t2v") / "shards")


@pytest.fixture(scope="session")
def i2v_shards(dataset: Path, tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(dataset, tiny_i2v, tmp_path_factory.mktemp("i2v") / "shards")


def randomise_lora(
    parameters: dict[str, torch.nn.Parameter], seed: int, scale: float = 0.2
) -> None:
    """Give every LoRA matrix values: a zero B hides that an adapter isn't applied."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * scale)


def transformers_before_each(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many there are whenever one is loaded for passes alone; filled as that happens."""
    counted: list[int] = []

    def counting(*given: Any, **named: Any) -> Any:
        gc.collect()
        counted.append(sum(type(one) is WanTransformer3DModel for one in gc.get_objects()))
        return load_base(*given, **named)

    monkeypatch.setattr(train.memory.forward_only, "load_base", counting)
    return counted
