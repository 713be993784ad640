"""docs/use-your-lora.md: its diffusers code is run, its numbers are those that are trained."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from tests.models import Mode, tiny_model
from tests.train.model.test_lora_adapter import ALL, trained
from train.functional.schedule import Schedule
from train.options import Expert
from train.saving.provenance import read_provenance

PAGE = (Path(__file__).parents[3] / "docs" / "use-your-lora.md").read_text()
(BLOCK,) = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)


@contextmanager
def visits() -> Iterator[list[tuple[int, float, list[str]]]]:
    """(transformer, timestep, its active LoRAs) of every forward pass while it is open."""
    seen: list[tuple[int, float, list[str]]] = []
    forward = WanTransformer3DModel.forward

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = float(kwargs["timestep"].flatten()[-1])
        seen.append((id(self), step, self.active_adapters()))
        return forward(self, *args, **kwargs)

    WanTransformer3DModel.forward = recorded
    try:
        yield seen
    finally:
        WanTransformer3DModel.forward = forward


def replaced(code: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def small(model: Path) -> tuple[tuple[str, str], ...]:
    """What makes the page's code run on a tiny model without a GPU."""
    return (
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", str(model)),
        ("pipe.enable_model_cpu_offload()\n", ""),
        ("height=480", "height=48"),
        ("width=832", "width=80"),
        ("num_frames=81", "num_frames=9"),
    )


TEXT_ONLY = (
    # As the page says: the other pipeline (its import, its use), no image.
    ("    WanImageToVideoPipeline,\n", "    WanPipeline,\n"),
    ("pipe = WanImageToVideoPipeline", "pipe = WanPipeline"),
    ('    image=load_image("first-frame.png"),\n', ""),
)
ONE = (
    (
        '{"high": "lora-high-diffusers.safetensors", "low": "lora-low-diffusers.safetensors"}',
        '{"full": "lora-full-diffusers.safetensors"}',
    ),
)


@pytest.mark.parametrize(
    ("mode", "experts", "changes", "told"),
    [
        ("i2v", ("high", "low"), (), {}),
        ("i2v", ("high", "low"), (), {"pairing": "euler", "flow_shift": 3.0}),
        ("t2v", ("high", "low"), TEXT_ONLY, {}),
        (
            "ti2v",
            ("full",),
            TEXT_ONLY + ONE,
            {"boundary": None, "denoising_step_indices_list": (1000.0, 600.0, 100.0)},
        ),
    ],
)
def test_diffusers_block_visits_the_trained_steps(
    mode: Mode,
    experts: tuple[Expert, ...],
    changes: tuple[tuple[str, str], ...],
    told: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(tmp_path / "model", mode, two_experts=len(experts) == 2)
    for expert in experts:
        trained(model, expert, ALL, tmp_path, **told)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)).save(
        tmp_path / "first-frame.png"
    )
    assert not re.search(r"\b(from|import) (train|shared|preprocess)\b", BLOCK)
    code = replaced(BLOCK, *changes, *small(model))
    if mode == "ti2v":
        code = replaced(code, ("height=48", "height=64"), ("width=80", "width=96"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "block"}
    with visits() as seen:
        exec(compile(code, "use-your-lora.md", "exec"), names)

    pipe = names["pipe"]
    schedule = read_provenance(tmp_path / f"lora-{experts[0]}-diffusers.safetensors").schedule
    high = len(schedule.owned_steps("high")) if len(experts) == 2 else len(schedule.indices)
    assert len(seen) == len(schedule.indices)  # one pass a step: no guidance
    for step, (transformer, timestep, adapters) in enumerate(seen):
        expected = pipe.transformer if step < high else pipe.transformer_2
        assert transformer == id(expected)
        assert timestep == pytest.approx(schedule.timesteps[step], abs=0.01)
        assert adapters == [experts[0] if step < high else "low"]
    assert (tmp_path / "clip.mp4").stat().st_size > 1000
    frames = np.asarray(names["frames"])
    assert frames.shape[0] == 9 and np.isfinite(frames).all() and frames.std() > 0


def rows(*columns: str) -> list[dict[str, str]]:
    """The page's table with these columns."""
    lines = PAGE.splitlines()
    first = lines.index("| " + " | ".join(columns) + " |")
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return found
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found.append(dict(zip(columns, cells, strict=True)))
    return found


def schedules() -> list[tuple[dict[str, str], Schedule]]:
    boundaries = {"i2v": 0.9, "t2v": 0.875}
    made = []
    for row in rows("model", "shift", "timesteps", "switch"):
        schedule = Schedule(
            indices=(1000, 750, 500, 250),
            shift=float(row["shift"]),
            boundary=boundaries.get(row["model"][-3:]) if "A14B" in row["model"] else None,
        )
        made.append((row, schedule))
    return made


def test_the_table_has_the_trained_steps() -> None:
    for row, schedule in schedules():
        groups = [
            [float(number) for number in group.split(",")] for group in row["timesteps"].split("·")
        ]
        assert [t for group in groups for t in group] == pytest.approx(
            list(schedule.timesteps), abs=0.06
        )
        if schedule.boundary is None:
            assert len(groups) == 1 and row["switch"] == "–"
        else:
            switch = len(schedule.owned_steps("high"))
            assert len(groups[0]) == switch and row["switch"] == f"after step {switch}"


def test_comfyuis_simple_scheduler_takes_the_trained_steps() -> None:
    """Its table has shift(k / 1000) for k = 1 … 1000; `simple` counts back by 1000 / steps."""
    for row, schedule in schedules():
        u = torch.arange(1, 1001, dtype=torch.float64) / 1000
        table = schedule.shift * u / (1 + (schedule.shift - 1) * u)
        taken = [float(table[-(1 + int(step * len(table) / 4))]) for step in range(4)]
        assert [1000 * sigma for sigma in taken] == pytest.approx(list(schedule.timesteps)), row
    switch = {row["KSampler (Advanced)"]: row for row in rows("KSampler (Advanced)", "high", "low")}
    by_mode = {row["model"][-3:]: schedule for row, schedule in schedules()[:2]}
    i2v, t2v = (len(by_mode[mode].owned_steps("high")) for mode in ("i2v", "t2v"))
    assert switch["`end_at_step`"]["high"] == f"{i2v} (t2v: {t2v})"
    assert switch["`start_at_step`"]["low"] == f"{i2v} (t2v: {t2v})"


def test_the_page_says_what_diffusers_alone_would_visit() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    listed = ", ".join(f"{t:.0f}" for t in scheduler.timesteps.tolist())
    assert f"(at shift 5: {listed})" in PAGE
