"""What a run holds, by `benchmarks/lean_run.py`: what it counts is right."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lean_run
from tests.train.bench.test_bench import LORAS, base_bytes
from tests.train.test_distill import SMALL


def held_apart(model: Path, shards: Path, file: Path, *more: str) -> dict[str, Any]:
    """In a process of its own, in fp32, as it is run by hand: the tests' has tensors of others."""
    command = [
        sys.executable, lean_run.__file__, "held", "--model", model, "--shards", shards, *SMALL,
        "--mixed_precision", "no", "--json", file, *more,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_run_holds_little_else(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    found = held_apart(tiny_t2v, t2v_shards, tmp_path / "found.json")
    assert found["base"] == base_bytes(tiny_t2v)
    assert found["loras"] == LORAS
    steps = found["optimizers"] - 2 * found["loras"]
    assert steps == 2 * 2 * 8 * 2 * 4  # one fp32 counter for each matrix
    assert 0 < found["others"] < 30e6


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])  # DeepSpeed makes steps in parts
def test_two_processes(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, strategy: str) -> None:
    """The first one's part of everything."""
    found = held_apart(
        tiny_t2v, t2v_shards, tmp_path / "found.json", "--device", "cpu",
        "--gen-update-interval", "2", "--strategy", strategy, "--num-processes", "2",
    )  # fmt: skip
    whole = base_bytes(tiny_t2v)
    assert whole / 2 <= found["base"] < 0.6 * whole
    assert LORAS / 2 <= found["loras"] < 0.6 * LORAS
    assert found["optimizers"] < 2 * 0.6 * LORAS
    assert found["others"] > 0


def test_the_loader(tiny_i2v: Path, i2v_shards: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_i2v), "--shards", str(i2v_shards), *SMALL]
    lean_run.measure("loader", options, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["raw"] > found["loaded"] > 0
