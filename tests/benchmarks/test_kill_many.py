"""`wanprep` dies at every moment, and the rerun makes the cache that nobody disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kill_many(*arguments: str) -> dict[str, int]:
    environment = {name: v for name, v in os.environ.items() if name != "WANDISTILL_FAULT"}
    ran = subprocess.run(
        [sys.executable, "benchmarks/kill_many.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(json.loads(ran.stdout))


@pytest.mark.long
@pytest.mark.parametrize(("fault", "every"), [("kill", "97"), ("enospc", "149")])
def test_a_fault_at_every_write_fsync_rename_and_removal(fault: str, every: str) -> None:
    found = kill_many("points", "--fault", fault, "--every", every)
    assert found["tried"] == -(-found["points"] // int(every)) >= 3
    # A full disk does not stop a removal or an fsync, and a file that is not needed is forgiven.
    assert found["interrupted"] == found["tried"] if fault == "kill" else found["interrupted"] > 0


@pytest.mark.long
def test_killed_from_outside_at_random_times() -> None:
    found = kill_many("random", "--tries", "6")
    assert found["tried"] == 6 and found["interrupted"] > 2
