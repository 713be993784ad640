"""The benchmark of quantised bases runs, and its numbers are in the order that they should be."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quantised_base.py"


@pytest.mark.long
def test_int8_is_nearest_and_nf4_farthest() -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--seeds", "1"], capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines()[2:]]
    far = {(row[0].strip(), row[1].split()[0]): float(row[2].split()[0]) for row in rows}
    for precision in ("fp32", "bf16"):
        int8, fp8, nf4 = (far[precision, stored] for stored in ("int8", "fp8", "nf4"))
        assert 0 < int8 < fp8 < nf4 < 0.5
