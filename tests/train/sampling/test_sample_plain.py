"""`wantrain sample` with LoRAs of `wantrain lora`: the base model's sampler, with its options."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler

from shared.errors import UserError
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.sampling.test_sample import frames, sample
from train.sampling.sample import VisitedSteps
from train.saving.export import lora_path

PLAIN: dict[str, Any] = {"method": "lora", "denoising_step_indices_list": (), "pairing": None}
FEW = ("--steps", "3", "--guidance-scale", "1")


def plain(model: Path, expert: Any, folder: Path, **changes: object) -> list[str]:
    """--lora of a plain LoRA with random weights."""
    trained(model, expert, ALL, folder, **(PLAIN | changes))
    return ["--lora", str(lora_path(folder, expert, "diffusers"))]


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Filled with (expert, timestep) of each transformer pass."""
    seen: list[tuple[str, float]] = []
    close = VisitedSteps.close

    def remember(self: VisitedSteps) -> None:
        seen.extend(self.visited)
        close(self)

    monkeypatch.setattr(VisitedSteps, "close", remember)
    return seen


def timesteps(shift: float, steps: int) -> list[float]:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def test_forty_steps_with_cfg_by_default(
    tiny_t2v: Path, tmp_path: Path, visited: list[tuple[str, float]],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = sample(tiny_t2v, tmp_path / "out", *plain(tiny_t2v, "high", tmp_path))
    (record,) = json.loads((out / "lora.json").read_text())
    assert (record["steps"], record["guidance_scale"]) == (40, 5.0)
    assert record["transformer_passes"] == 80
    assert [t for _, t in visited[::2]] == pytest.approx(timesteps(12.0, 40))
    assert {expert for expert, _ in visited} == {"high", "low"}
    said = " ".join(capfd.readouterr().err.split())
    assert "only the high-noise expert has a LoRA; the other runs without one" in said


def test_the_options_of_many_steps_count(
    tiny_t2v: Path, tmp_path: Path, visited: list[tuple[str, float]]
) -> None:
    pair = plain(tiny_t2v, "high", tmp_path) + plain(tiny_t2v, "low", tmp_path)
    clips = {}
    for name, more in {
        "plain": FEW,
        "again": FEW,
        "guided": ("--steps", "3", "--guidance-scale", "4"),
        "negative": ("--steps", "3", "--guidance-scale", "4", "--negative-prompt", "waves"),
        "shifted": (*FEW, "--flow-shift", "3"),
    }.items():
        visited.clear()
        clips[name] = frames(sample(tiny_t2v, tmp_path / name, *pair, *more) / "lora-000.mp4")
        passes = 3 if "--guidance-scale 1" in " ".join(more) else 6
        assert len(visited) == passes
        expected = timesteps(3.0 if name == "shifted" else 12.0, 3)
        assert [t for _, t in visited[:: passes // 3]] == pytest.approx(expected)
    assert np.array_equal(clips["plain"], clips["again"])
    assert all(not np.array_equal(clips[a], clips[b]) for a, b in (
        ("plain", "guided"), ("guided", "negative"), ("plain", "shifted")
    ))  # fmt: skip
    base = frames(sample(tiny_t2v, tmp_path / "base", "--teacher", *FEW) / "teacher-000.mp4")
    assert not np.array_equal(base, clips["plain"])


def test_the_shift_of_the_training_is_the_default(
    tiny_t2v: Path, tmp_path: Path, visited: list[tuple[str, float]]
) -> None:
    sample(tiny_t2v, tmp_path / "out", *plain(tiny_t2v, "full", tmp_path, flow_shift=7.0), *FEW)
    assert [t for _, t in visited] == pytest.approx(timesteps(7.0, 3))
    assert {expert for expert, _ in visited} == {"high"}  # a full one works alone


def test_a_pair_at_two_shifts_needs_to_be_told(
    tiny_t2v: Path, tmp_path: Path, visited: list[tuple[str, float]]
) -> None:
    pair = plain(tiny_t2v, "high", tmp_path) + plain(tiny_t2v, "low", tmp_path, flow_shift=3.0)
    with pytest.raises(UserError, match=r"--flow-shift: .* at shift 12 and .* at 3\. Choose"):
        sample(tiny_t2v, tmp_path / "out", *pair, *FEW)
    sample(tiny_t2v, tmp_path / "out", *pair, *FEW, "--flow-shift", "8")
    assert [t for _, t in visited] == pytest.approx(timesteps(8.0, 3))


def test_a_student_and_a_plain_one_are_no_pair(tiny_t2v: Path, tmp_path: Path) -> None:
    student = trained(tiny_t2v, "low", ALL, tmp_path) and [
        "--lora", str(lora_path(tmp_path, "low", "diffusers"))
    ]  # fmt: skip
    for pair in (
        student + plain(tiny_t2v, "high", tmp_path),
        plain(tiny_t2v, "high", tmp_path) + student,
    ):
        with pytest.raises(UserError, match=r"trained apart: method is '(distill|lora)' in the"):
            sample(tiny_t2v, tmp_path / "out", *pair)
