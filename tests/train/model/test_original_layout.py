"""Training and sampling from Wan's original layout: the same transformer, LoRA and clips."""

from pathlib import Path

import pytest
import torch

from shared.models.spec import read_model_spec
from tests.models import Mode
from tests.preprocess.encode.test_original_layout import both
from tests.train.conftest import encode
from tests.train.sampling.test_sample import frames, sample
from tests.train.test_distill import distill, final_bytes
from train.model.base import base_digest, load_base
from train.options import Expert

CPU = torch.device("cpu")


def assert_alike(one: Path, two: Path) -> None:
    """The same clip but for last bits, which the weights' place in memory decides on a CPU."""
    first, second = (frames(path).astype(int) for path in (one, two))
    assert abs(first - second).mean() < 0.1  # H.264 makes a few more of a last bit
    assert first.std() > 0.5


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("mode", ["i2v", "ti2v", "wan21-i2v", "wan21-flf2v"])
def test_the_transformer_is_the_same_to_the_bit(mode: Mode, precision: str, tmp_path: Path) -> None:
    prefix = "model.diffusion_model." if mode == "ti2v" else ""  # as in ComfyUI's files
    model, original = both(mode, tmp_path, prefix=prefix)
    experts: tuple[Expert, ...] = ("high", "low") if mode == "i2v" else ("full",)
    seen = []
    for expert in experts:
        outputs, dtypes = [], []
        for folder in (model, original):
            base = load_base(
                read_model_spec(folder), expert,
                precision=precision, device=CPU, gradient_checkpointing=False,  # type: ignore[arg-type]
            )  # fmt: skip
            for parameter in base.parameters():
                # Where a mapped file happens to put it in memory decides last bits on a CPU.
                parameter.data = parameter.data.clone()
            dtypes.append({name: value.dtype for name, value in base.state_dict().items()})
            rng = torch.Generator().manual_seed(3)
            inputs = torch.randn(2, base.config.in_channels, 3, 4, 6, generator=rng)
            text = torch.randn(2, 512, 32, generator=rng)
            pictures = {"wan21-i2v": 2, "wan21-flf2v": 4}.get(mode)
            clip = None if pictures is None else torch.randn(pictures, 10, 32, generator=rng)
            with (
                torch.no_grad(),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            ):
                outputs.append(
                    base(inputs, torch.tensor([937.5, 625.0]), text, clip, return_dict=False)[0]
                )
        assert dtypes[0] == dtypes[1]
        assert len(set(dtypes[0].values())) == (2 if precision == "bf16" else 1)
        assert torch.equal(*outputs) and outputs[0].float().std() > 0.01
        seen.append(outputs[0])
        component = "transformer_2" if expert == "low" else "transformer"
        assert base_digest(model, component) == base_digest(original, component)
    assert len(seen) == 1 or not torch.equal(*seen)


def test_the_whole_way(dataset: Path, tmp_path: Path) -> None:
    """encode → distill → sample from the original folder; the LoRA is that of diffusers' folder."""
    model, original = both("t2v", tmp_path)
    shards = encode(dataset, original, tmp_path / "shards")
    more = ("--max-train-steps", "1", "--boundary-type", "high")
    one = distill(model, shards, tmp_path / "one", *more)
    two = distill(original, shards, tmp_path / "two", *more)
    assert final_bytes(one) == final_bytes(two) and len(final_bytes(one)) == 3
    lora = str(one / "lora-high-diffusers.safetensors")
    clips = [
        sample(folder, tmp_path / f"clips-{folder.name}", "--lora", lora) / "student-000.mp4"
        for folder in (model, original)
    ]
    assert_alike(*clips)


def test_i2v_with_clip_is_sampled(tmp_path: Path) -> None:
    from PIL import Image

    model, original = both("wan21-i2v", tmp_path)
    Image.effect_noise((70, 64), 60).convert("RGB").save(tmp_path / "first.png")
    more = ("--teacher", "--steps", "2", "--image", str(tmp_path / "first.png"))
    clips = [
        sample(folder, tmp_path / f"clips-{folder.name}", *more) / "teacher-000.mp4"
        for folder in (model, original)
    ]
    assert_alike(*clips)
