"""docs/use-your-lora.md: its code is a model card's, its numbers are those that are trained."""

import re
from pathlib import Path

import pytest
import torch

from shared.models.spec import DEFAULT_MODEL
from tests.train.sampling.test_comfyui import provenance
from train.functional.schedule import Schedule
from train.sampling.model_card import Trained, model_card

PAGE = (Path(__file__).parents[3] / "docs" / "use-your-lora.md").read_text()


def test_the_code_is_a_model_card_s() -> None:
    """Which `test_model_card.py` runs."""
    both = [Trained(provenance=provenance(expert=expert)) for expert in ("high", "low")]
    code = re.compile(r"(?ms)^```python\n.*?^```")
    assert code.findall(PAGE) == code.findall(model_card(both, 5120, model=DEFAULT_MODEL))


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
