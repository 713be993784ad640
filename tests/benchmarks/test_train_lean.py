"""The benchmark of lean training runs, at tiny sizes; its numbers are for people."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_lean.py"


@pytest.mark.long
def test_all_of_it_runs() -> None:
    command = [sys.executable, str(BENCHMARK), "--quick"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in (
        "step time / transformer passes alone", "resident / one base, LoRAs, optimizers",
        "loader / sequential read", "start at a million samples / at 256",
        "in-loop / lean, time of a critic update", "in-loop / lean, time of a generator update",
        "in-loop / lean, resident weights", "start to first step, all samples",
    ):  # fmt: skip
        assert re.search(rf"(?m)^{re.escape(name)} +\d+\.\d+", ran.stdout), name
    # Three bases against one: the rest is LoRAs and encoders.
    (weights,) = re.findall(r"(?m)^in-loop / lean, resident weights +(\S+)$", ran.stdout)
    assert float(weights) > 2
    assert len(re.findall(r"\(goal [≤≥] [\d.]+: (?:reached|missed)\)", ran.stdout)) == 3
