"""The benchmark of overlap runs `wanprep encode` and understands what it says."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "encode_overlap.py"


def test_too_small_a_run_says_nothing_and_exits_with_2() -> None:
    command = [sys.executable, BENCHMARK, "--images", "0", "--videos", "1", "--size", "64"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "wall time of the media pass" in ran.stdout and "waiting for the disk" in ran.stdout
    assert "says nothing: expected at least 0.2 s and 0.1 s a sample" in ran.stdout
