"""The benchmark of the index runs, at a small size; its numbers are for people."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "index_million.py"


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.long
def test_synthetic_rows() -> None:
    said = run("--samples", "1000")
    assert "1,000 samples" in said and said.count("peak memory") == 4
    assert "sort, write index.zarr and manifest" in said and "look every sample up" in said


@pytest.mark.long
def test_real_tars() -> None:
    said = run("--tars", "30")
    assert "wanprep index, all of it" in said and "headers alone, tarfile" in said
