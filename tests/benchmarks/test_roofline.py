"""The computed time of an update: it runs as its documentation says, and its parts agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_it_runs_from_the_root() -> None:
    """A critic's update at batch 1: its rollout, the pass that trains, and nothing else."""
    command = [sys.executable, "benchmarks/roofline.py", "--model", "wan2.1-t2v-1.3b"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    seconds = {
        name: float(value)
        for name, value in re.findall(
            r"(?m)^\| ([\w ]+) \|(?: [\d,]+ \|){4} ([\d.]+) \|$", ran.stdout
        )
    }
    assert 0 < seconds["teacher"] <= seconds["role"] < seconds["trains"]
    (critic,) = re.findall(r"(?m)^\| today \| ([\d.]+) \|", ran.stdout)
    steps = 4  # one expert owns them all
    expected = (steps + 1) / 2 * seconds["role"] + seconds["trains"]
    assert float(critic) == pytest.approx(expected, abs=0.3)
