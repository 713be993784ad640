"""`wantrain sample`: real pipelines, real LoRA files, exactly the trained timesteps, real mp4."""

from pathlib import Path

import decord
import numpy as np
import pytest
from PIL import Image

from shared.errors import UserError
from tests.train.model.test_lora_adapter import ALL, trained
from train.cli.app import app as wantrain
from train.functional.schedule import Schedule
from train.options import Expert
from train.sampling.sample import VisitedSteps
from train.saving.export import lora_path

SHAPE = ("--height", "48", "--width", "80", "--num-frames", "9", "--dtype", "fp32")


def sample(model: Path, out: Path, *more: str) -> Path:
    wantrain(
        [
            "sample", "--model", str(model), "--output", str(out), "--prompt", "waves, moving",
            "--device", "cpu", *SHAPE, *more,
        ],
        standalone_mode=False,
    )  # fmt: skip
    return out


def frames(path: Path) -> np.ndarray:
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy()


@pytest.fixture
def pair(tiny_t2v: Path, tmp_path: Path) -> list[str]:
    """--lora arguments for a high and a low file."""
    arguments = []
    for expert in ("high", "low"):
        trained(tiny_t2v, expert, ALL, tmp_path)  # type: ignore[arg-type]
        arguments += ["--lora", str(lora_path(tmp_path, expert, "diffusers"))]  # type: ignore[arg-type]
    return arguments


@pytest.mark.parametrize("pairing", ["renoise", "euler"])
@pytest.mark.parametrize(("mode", "owner"), [("t2v", "HHHL"), ("i2v", "HHLL")])
def test_student_takes_the_trained_steps(
    mode: str, owner: str, pairing: str, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    visited: list[tuple[str, float]] = []
    check = VisitedSteps.check

    def remember(self: VisitedSteps, schedule: Schedule, *, one_transformer: bool) -> None:
        visited.extend(self.visited)
        check(self, schedule, one_transformer=one_transformer)

    monkeypatch.setattr(VisitedSteps, "check", remember)
    model = tiny_i2v if mode == "i2v" else tiny_t2v
    more: list[str] = []
    for expert in ("high", "low"):
        trained(model, expert, ALL, tmp_path, pairing=pairing)  # type: ignore[arg-type]
        more += ["--lora", str(lora_path(tmp_path, expert, "comfyui"))]  # type: ignore[arg-type]
    if mode == "i2v":
        picture = np.random.default_rng(0).integers(0, 255, (70, 64, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "first.png")
        more += ["--image", str(tmp_path / "first.png")]

    out = sample(model, tmp_path / "out", *more)
    times = {"t2v": (1000, 972.973, 923.077, 800), "i2v": (1000, 937.5, 833.333, 625)}[mode]
    assert [expert[0].upper() for expert, _ in visited] == list(owner)
    assert [t for _, t in visited] == pytest.approx(times, abs=1e-2)
    assert frames(out / "student-000.mp4").shape == (9, 48, 80, 3)
    assert Image.open(out / "student-sheet.png").width > 6 * 80


@pytest.mark.parametrize("image", [False, True])
def test_a_ti2v_teacher_takes_an_image_or_none(
    image: bool, tiny_ti2v: Path, tmp_path: Path
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (70, 64, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    more = ["--image", str(tmp_path / "first.png")] if image else []
    size = ["--height", "64", "--width", "96"]
    out = sample(tiny_ti2v, tmp_path / "out", "--teacher", "--steps", "2", *more, *size)
    assert frames(out / "teacher-000.mp4").shape == (9, 64, 96, 3)


def test_the_lora_decides_and_the_seed_repeats(
    tiny_t2v: Path, pair: list[str], tmp_path: Path
) -> None:
    first = frames(sample(tiny_t2v, tmp_path / "1", *pair) / "student-000.mp4")
    again = frames(sample(tiny_t2v, tmp_path / "2", *pair) / "student-000.mp4")
    other = frames(sample(tiny_t2v, tmp_path / "3", *pair, "--seed", "1") / "student-000.mp4")
    high_only = frames(sample(tiny_t2v, tmp_path / "4", *pair[:2]) / "student-000.mp4")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, high_only)


def test_full_lora_works_alone_at_every_step(tiny_t2v: Path, tmp_path: Path) -> None:
    trained(tiny_t2v, "full", ALL, tmp_path)
    out = sample(
        tiny_t2v, tmp_path / "out", "--lora", str(lora_path(tmp_path, "full", "diffusers"))
    )
    assert (out / "student-000.mp4").exists()


def test_teacher(tiny_t2v: Path, tmp_path: Path) -> None:
    out = sample(tiny_t2v, tmp_path / "out", "--teacher", "--steps", "3")
    assert frames(out / "teacher-000.mp4").shape == (9, 48, 80, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("flow_shift", 5.0, r"trained apart: flow_shift is 12\.0 in the first and 5\.0 in the"),
        ("denoising_step_indices_list", (1000.0, 500.0, 250.0), "denoising_step_indices_list is"),
        ("pairing", "euler", "pairing is 'renoise' in the first and 'euler' in the second"),
        ("boundary", 0.9, "boundary is 0.875 in the first and 0.9 in the second"),
    ],
)
def test_a_pair_of_other_schedules_is_refused(
    tiny_t2v: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    trained(tiny_t2v, "high", ALL, tmp_path)
    trained(tiny_t2v, "low", ALL, tmp_path, **{field: value})
    files = [str(lora_path(tmp_path, expert, "diffusers")) for expert in _EXPERTS]
    with pytest.raises(UserError, match=message):
        sample(tiny_t2v, tmp_path / "out", "--lora", files[0], "--lora", files[1])


_EXPERTS: tuple[Expert, Expert] = ("high", "low")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "neither --lora nor --teacher"),
        (("--teacher", "--prompt", " "), "--prompt: found an empty prompt"),
        (("--teacher", "--prompt", "\u200b\u3164\ufeff"), "--prompt: found an empty prompt"),
        (("--teacher", "--height", "50"), "--height: found 50, expected a multiple of 16"),
        (("--teacher", "--num-frames", "16"), r"--num-frames: found 16, expected 4n\+1, e.g. 13"),
        (("--teacher", "--image", "x.png"), "t2v model and takes no image"),
        (("--lora", "nowhere.safetensors"), "cannot read nowhere.safetensors"),
    ],
)
def test_bad_values(tiny_t2v: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(tiny_t2v, tmp_path / "out", *more)


def test_lora_of_another_mode_and_missing_image(
    tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    trained(tiny_t2v, "high", ALL, tmp_path)
    lora = ("--lora", str(lora_path(tmp_path, "high", "diffusers")))
    with pytest.raises(UserError, match="is an i2v model and needs a first frame"):
        sample(tiny_i2v, tmp_path / "out", *lora)
    Image.new("RGB", (80, 48), "red").save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"was trained for t2v, the model .* is i2v"):
        sample(tiny_i2v, tmp_path / "out", *lora, "--image", str(tmp_path / "a.png"))
