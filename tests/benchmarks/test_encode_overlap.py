"""The benchmark of overlap runs `wanprep encode` and understands what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "encode_overlap.py"


@pytest.mark.long
def test_its_exit_code_is_its_verdict() -> None:
    """One clip is too little to hide anything behind; a busy machine may take long all the same."""
    command = [sys.executable, BENCHMARK, "--images", "0", "--videos", "1", "--size", "64"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert "wall time of the media pass" in ran.stdout, ran.stdout + ran.stderr
    assert "waiting for the disk" in ran.stdout
    verdicts = {0: "1.05: reached)", 1: "1.05: missed)", 2: "says nothing: expected at least"}
    assert verdicts[ran.returncode] in ran.stdout
