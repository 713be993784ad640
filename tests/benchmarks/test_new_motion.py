"""The benchmark of `wantrain lora`: what it trains, what it measures, what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from new_motion import Bench, Size, rows, table  # noqa: E402
from toy_students import ToyBench  # noqa: E402

SIZE = Size(every=2, updates=4)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    found = object.__new__(Bench)
    found.size, found.work, found.flags = SIZE, tmp_path, ("--rank", "32")
    found.new, found.old, found.weights = tmp_path / "new", tmp_path / "old", "toy-1"
    return found


def test_old_clips_are_in_one_kind_of_runs_alone(bench: Bench) -> None:
    alone, mixed = (bench.training(mixed=mixed, seed=0) for mixed in (False, True))
    assert alone.command[1] == mixed.command[1] == "lora"
    assert f"--shards={bench.new}" in alone.command and f"--shards={bench.new}" in mixed.command
    assert f"--shards={bench.old}" not in alone.command and f"--shards={bench.old}" in mixed.command
    assert len({alone.folder, mixed.folder, bench.training(mixed=True, seed=1).folder}) == 3


def test_what_decides_a_measurement_is_in_its_files_name(bench: Bench) -> None:
    cases = [
        ("new", 0, False, 0), ("old", 0, False, 0), ("new", 1, False, 0), ("new", 0, False, 2),
        ("new", 0, True, 2), ("new", 0, False, 4),
    ]  # fmt: skip
    files = {
        bench.measurement(kind, seed, mixed=mixed, updates=updates).file
        for kind, seed, mixed, updates in cases
    }
    assert len(files) == len(cases)


def test_the_table_has_means_and_errors(bench: Bench) -> None:
    assert [updates for _, _, updates in rows(SIZE)] == [0, 2, 4, 2, 4]
    results = {
        bench.measurement(kind, seed, mixed=mixed, updates=updates): value + 0.2 * seed
        for _, mixed, updates in rows(SIZE)
        for seed in (0, 1)
        for kind, value in (("new", 0.1), ("old", 0.7))
    }
    lines = table(bench, 2, results).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2] == "| the toy itself | 0.200 ± 0.100 | 0.800 ± 0.100 |"


def test_clips_are_judged_by_the_captions_that_they_were_sampled_for() -> None:
    from render_clips import NEW_CAPTIONS

    bench = ToyBench("toy", 13, NEW_CAPTIONS)
    assert bench.captions == [*NEW_CAPTIONS, NEW_CAPTIONS[0]]
    old = ToyBench("toy", 13)
    assert not set(old.captions) & set(bench.captions)


@pytest.mark.long
def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/new_motion.py", "--quick", "--seeds", "1", "--work"]
    ran = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert ran.stdout.count("±") == 10
