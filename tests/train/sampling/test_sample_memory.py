"""`wantrain sample` on a small GPU: components that come and go, blocks that stream, fewer bits."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.errors import UserError
from tests.models import full_once, tiny_model
from tests.train.memory.test_block_offload import LateStream
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.sampling.test_sample import frames, sample
from train.memory.quantize import QuantisedPrecision
from train.sampling.sample import VisitedSteps
from train.saving.export import lora_path

LAYERS = 4
SMALL = ("--height", "32", "--width", "64", "--num-frames", "5")
TWO_CLIPS = ("--prompt", "a circle")  # beside `sample`'s own: what has been moved is moved again


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """Mode → a model of two experts with more blocks than buffers, and its options: both LoRAs,
    and an image for i2v."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def make(mode: Any) -> tuple[Path, list[str]]:
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            model = tiny_model(folder / "model", mode, num_layers=LAYERS)
            options = []
            for expert in ("high", "low"):
                trained(model, expert, ALL, folder)  # type: ignore[arg-type]
                options += ["--lora", str(lora_path(folder, expert, "diffusers"))]  # type: ignore[arg-type]
            if mode == "i2v":
                picture = np.random.default_rng(0).integers(0, 255, (70, 64, 3)).astype(np.uint8)
                Image.fromarray(picture).save(folder / "first.png")
                options += ["--image", str(folder / "first.png")]
            made[mode] = model, [*options, *SMALL]
        return made[mode]

    return make


def clips(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("*.mp4"))]


@pytest.mark.parametrize("mode", [pytest.param("t2v", marks=pytest.mark.long), "i2v"])
def test_clips_are_the_same_to_the_bit(
    mode: str, deep: Callable[[str], tuple[Path, list[str]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Both experts with their LoRAs in bf16, two clips, copies as late as a GPU may make them; and
    of each expert's blocks no more than two have weights on the device when it begins."""
    model, options = deep(mode)
    words = (*options, *TWO_CLIPS, "--dtype", "bf16")
    expected = clips(sample(model, tmp_path / "plain", *words))
    assert len(set(expected)) == 2
    assert clips(sample(model, tmp_path / "offload", *words, "--offload")) == expected

    there: list[int] = []
    record = VisitedSteps._record

    def counted(self: VisitedSteps, expert: str) -> Any:
        hook = record(self, expert)

        def look(module: Any, args: Any, kwargs: Any) -> None:
            sizes = [sum(p.numel() for p in block.parameters()) for block in module.blocks]
            there.append(sum(size > 0 for size in sizes))
            hook(module, args, kwargs)

        return look

    monkeypatch.setattr(VisitedSteps, "_record", counted)
    monkeypatch.setattr("train.memory.block_offload.SideStream", LateStream)
    capsys.readouterr()
    assert clips(sample(model, tmp_path / "streamed", *words, "--low-vram")) == expected
    assert len(there) == 8 and max(there) <= 2, "LoRAs stream, too"
    ((number, home, device),) = re.findall(
        r"stream   (\d+) blocks of ([\d.]+) MB in CPU memory; on the device ([\d.]+) MB",
        capsys.readouterr().err,
    )
    assert int(number) > 2 * LAYERS, "the text encoder's blocks, too"
    assert float(device) < float(home)


@pytest.mark.parametrize(
    "stored", ["int8", *(pytest.param(few, marks=pytest.mark.long) for few in ("fp8", "nf4"))]
)
def test_a_quantised_base_keeps_its_loras_and_streams(
    stored: QuantisedPrecision, deep: Callable[[str], tuple[Path, list[str]]], tmp_path: Path,
) -> None:  # fmt: skip
    model, options = deep("t2v")
    whole = frames(sample(model, tmp_path / "whole", *options) / "student-000.mp4")
    without = frames(sample(model, tmp_path / "high", *options[:2], *SMALL) / "student-000.mp4")
    words = (*options, "--base-precision", stored)
    out = sample(model, tmp_path / "few", *words)
    assert clips(sample(model, tmp_path / "streamed", *words, "--low-vram")) == clips(out)
    few = frames(out / "student-000.mp4")
    records = [json.loads((at / "student.json").read_text())[0] for at in (out, tmp_path / "whole")]
    assert [record["base_precision"] for record in records] == [stored, "fp32"]

    def apart(clip: np.ndarray) -> float:
        return float(np.abs(clip.astype(float) - whole).mean())

    assert 0 < apart(few) < apart(without), (apart(few), apart(without))


def test_nf4_without_bitsandbytes_says_what_to_install(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.memory.quantize.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'wandistill\[quant\]'"):
        sample(tiny_t2v, tmp_path / "out", "--teacher", "--base-precision", "nf4")


def test_a_clip_that_does_not_fit_is_decoded_in_tiles(
    deep: Callable[[str], tuple[Path, list[str]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, options = deep("i2v")
    full_once(monkeypatch)
    sample(model, tmp_path / "out", *options, "--offload")
    assert capsys.readouterr().err.count("decoded in tiles") == 1
    assert len(clips(tmp_path / "out")) == 1
