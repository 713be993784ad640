"""The benchmark of speed levers runs, at tiny sizes; its numbers are for people."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "speed_levers.py"


@pytest.mark.long
def test_all_of_it_runs() -> None:
    """But for compiling, which takes minutes."""
    found = {}
    for mode in ((), ("--profile",)):
        command = [sys.executable, str(BENCHMARK), "--quick", *mode]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found[mode] = ran.stdout
    levers = (
        *("--batched-guidance", "--keep-attention", "--fused-lora"),
        "--attention-backend _native_math",
    )
    for lever in levers:
        row = rf"(?m)^{re.escape(lever)} / plain +critic +\d\.\d+  generator +\d\.\d+ "
        assert len(re.findall(row, found[()])) == 2, lever
    assert len(re.findall(r"(?m)^aten::\S+ +\d+\.\d\d%$", found["--profile",])) > 20
