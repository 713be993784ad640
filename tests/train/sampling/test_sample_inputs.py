"""What `wantrain sample` makes of its inputs: picture, shift of the teacher, LoRA metadata."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tests.train.model.test_lora_adapter import ALL, provenance, trained
from tests.train.sampling.test_sample import sample
from train.sampling.sample import VisitedSteps, fit_image
from train.saving.export import lora_path
from train.saving.lora_formats import FORMS
from train.saving.provenance import read_provenance


@pytest.mark.parametrize(
    ("family", "more", "shift"),
    [
        ("t2v", (), 12.0),
        ("i2v", (), 5.0),
        ("t2v", ("--flow-shift", "3"), 3.0),
        ("i2v", ("--flow-shift", "8"), 8.0),
    ],
)
def test_the_teachers_shift_is_the_familys(
    family: str, more: tuple[str, ...], shift: float, tiny_t2v: Path, tiny_i2v: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The model folders' scheduler configs say 5 (t2v) and 7 (i2v here): neither counts."""
    model = tmp_path / "model"
    model.mkdir()
    for part in (tiny_i2v if family == "i2v" else tiny_t2v).iterdir():
        if part.name != "scheduler":
            (model / part.name).symlink_to(part)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=7.0 if family == "i2v" else 5.0,
    ).save_pretrained(model / "scheduler")
    if family == "i2v":
        Image.new("RGB", (80, 48), "red").save(tmp_path / "a.png")
        more = (*more, "--image", str(tmp_path / "a.png"))
    visited: list[float] = []
    close = VisitedSteps.close

    def remember(self: VisitedSteps) -> None:
        visited.extend(t for _, t in self.visited)
        close(self)

    monkeypatch.setattr(VisitedSteps, "close", remember)
    sample(model, tmp_path / "out", "--teacher", "--steps", "3", "--guidance-scale", "1", *more)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(3)
    assert visited == pytest.approx(scheduler.timesteps.tolist())
    u = np.array([0.999, 0.666, 0.333])  # roughly; only the shift's size is to be seen
    assert visited == pytest.approx((1000 * shift * u / (1 + (shift - 1) * u)).tolist(), rel=0.01)


@pytest.mark.parametrize(
    "option",
    [
        ("--steps", "4"),
        ("--guidance-scale", "1"),
        ("--negative-prompt", ""),
        ("--flow-shift", "12"),
    ],
    ids=lambda option: option[0],
)
def test_options_of_the_teacher_are_refused_beside_a_lora(
    tiny_t2v: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    trained(tiny_t2v, "high", ALL, tmp_path)
    lora = str(lora_path(tmp_path, "high", "diffusers"))
    with pytest.raises(UserError, match=rf"{option[0]}: found with --lora.*option of --teacher"):
        sample(tiny_t2v, tmp_path / "out", "--lora", lora, *option)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="found both --lora and --teacher"):
        sample(tiny_t2v, tmp_path / "out", "--lora", lora, "--teacher")


def _picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 255, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "covered", "corner"),
    [
        ((60, 90), (53, 80), (2, 0)),  # height, width: 80 / 90 covers, 60 · 8/9 = 53.3
        ((90, 60), (120, 80), (36, 0)),  # 80 / 60
        ((96, 400), (48, 200), (0, 60)),  # 48 / 96
        ((48, 80), (48, 80), (0, 0)),
        ((48, 99), (48, 99), (0, 9)),  # cropped alone: to the left where it is odd
        ((20, 20), (80, 80), (16, 0)),  # enlarged
    ],
)
def test_a_picture_covers_and_its_centre_stays(
    tmp_path: Path, source: tuple[int, int], covered: tuple[int, int], corner: tuple[int, int]
) -> None:
    """To 48 × 80 (height × width), numbers worked out by hand."""
    pixels = _picture(*source)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = fit_image(tmp_path / "a.png", 48, 80)
    assert (found.mode, found.size) == ("RGB", (80, 48))
    large = Image.fromarray(pixels).resize(covered[::-1], Image.Resampling.BILINEAR)
    top, left = corner
    assert np.array_equal(np.asarray(found), np.asarray(large)[top : top + 48, left : left + 80])


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (6, lambda stored: np.rot90(stored, -1)),  # the camera was turned: rotate clockwise
        (8, lambda stored: np.rot90(stored, 1)),
    ],
)
def test_a_turned_picture_is_set_upright_first(
    tmp_path: Path, orientation: int, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    stored = _picture(60, 90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(upright(stored))).save(tmp_path / "upright.png")
    found = fit_image(tmp_path / "turned.png", 48, 80)
    assert np.array_equal(
        np.asarray(found), np.asarray(fit_image(tmp_path / "upright.png", 48, 80))
    )


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_picture_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"--image: cannot read .*a\.png"):
        fit_image(tmp_path / "a.png", 48, 80)
    with pytest.raises(UserError, match=r"--image: cannot read .*b\.png"):
        fit_image(tmp_path / "b.png", 48, 80)


def _retold(model: Path, folder: Path, form: str, tell: Callable[[dict[str, Any]], str]) -> Path:
    """A real LoRA file whose provenance was changed by `tell`."""
    trained(model, "high", ALL, folder)
    path = lora_path(folder, "high", form)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["wandistill"] = tell(json.loads(metadata["wandistill"]))
    save_file(load_file(path), path, metadata)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_field_of_a_later_version_is_passed_over(
    tiny_t2v: Path, tmp_path: Path, form: str
) -> None:
    path = _retold(
        tiny_t2v, tmp_path, form, lambda told: json.dumps(told | {"colour": {"of": ["sky"]}})
    )
    assert read_provenance(path) == provenance("high", "t2v")


@pytest.mark.parametrize("field", sorted(provenance("high", "t2v").__dict__.keys() - {"gauges"}))
def test_a_missing_field_is_named(tiny_t2v: Path, tmp_path: Path, field: str) -> None:
    def without(told: dict[str, Any]) -> str:
        del told[field]
        return json.dumps(told)

    path = _retold(tiny_t2v, tmp_path, "diffusers", without)
    with pytest.raises(UserError, match=rf"metadata of .*{path.name} is damaged \(.*{field}"):
        read_provenance(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"high"', "\x00", '{"expert": "high"}', "[1, 2]"]
)
def test_corrupt_metadata_is_no_traceback(tiny_t2v: Path, tmp_path: Path, text: str) -> None:
    path = _retold(tiny_t2v, tmp_path, "comfyui", lambda _: text)
    with pytest.raises(UserError, match=r"metadata of .* is damaged.*that `wantrain` wrote"):
        sample(tiny_t2v, tmp_path / "out", "--lora", str(path))


def test_a_truncated_lora_file_is_named(tiny_t2v: Path, tmp_path: Path) -> None:
    trained(tiny_t2v, "high", ALL, tmp_path)
    path = lora_path(tmp_path, "high", "diffusers")
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"cannot read .*{path.name} as safetensors"):
            sample(tiny_t2v, tmp_path / "out", "--lora", str(path))


def test_tensors_of_another_shape_are_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    path = _retold(tiny_t2v, tmp_path, "diffusers", json.dumps)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    wrong = {name: torch.ones(3, 5) for name in load_file(path)}
    save_file(wrong, path, metadata)
    with pytest.raises(UserError, match=r"has A of shape \[3, 5\] and B of \[3, 5\]"):
        sample(tiny_t2v, tmp_path / "out", "--lora", str(path))
