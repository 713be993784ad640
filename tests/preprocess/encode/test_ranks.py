"""Several processes fill one cache: each its share, none waits, a dead one costs its own rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cache.ranks import Rank, this_rank
from shared.cache.writer import output_lock, writer_lock
from shared.errors import UserError
from shared.format.cache import committed_shards
from shared.format.prompts import read_prompts
from shared.io.store import Store
from tests.preprocess.conftest import REPOSITORY, Cache, wanprep, wanprep_process

SETTINGS = ("--size", 256, "--dtype", "fp32", "--shard-size-mb", 1, "--device", "cpu")


def command(model: Path, data: Path, output: Path) -> tuple[object, ...]:
    options = ("--model", model, "--train-data-dir", data, "--output", output)
    return ("encode", *options, *SETTINGS, "--num-workers", 1)


@pytest.fixture(scope="module")
def alone(pictures: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    output = tmp_path_factory.mktemp("alone")
    ran = wanprep(*command(tiny_t2v, pictures, output))
    assert ran.code == 0, ran.err
    return Cache.open(output)


def _writers(folder: Path) -> dict[str, int]:
    """Writer → samples that it committed."""
    found: dict[str, int] = {}
    for sidecar in committed_shards(folder):
        if sidecar.kind == "samples":
            writer = sidecar.shard.split("-")[-2]
            found[writer] = found.get(writer, 0) + sidecar.count
    return found


@pytest.mark.long
def test_accelerate_launches_two_ranks(
    pictures: Path, tiny_t2v: Path, alone: Cache, tmp_path: Path
) -> None:
    # accelerate starts one process only with --cpu; --multi_gpu is its name for torchrun.
    launcher = Path(sys.executable).with_name("accelerate")
    launch = (launcher, "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1)
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0)
    wanprep_path = Path(sys.executable).with_name("wanprep")
    arguments = (*launch, *options, "--no_python", wanprep_path)
    done = subprocess.run(
        [str(a) for a in (*arguments, *command(tiny_t2v, pictures, tmp_path))],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert "rank     0 of 2" in done.stderr and "rank     1 of 2" in done.stderr
    writers = _writers(tmp_path)
    assert set(writers) == {"w000", "w001"} and sum(writers.values()) == 12
    cache = Cache.open(tmp_path)
    assert cache.contents() == alone.contents()
    prompts = read_prompts(Store(tmp_path), cache.index.prompt_shards)
    assert [prompt.role for prompt in prompts] == ["empty", "negative"]
    assert not list(tmp_path.glob(".text-*")) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.long
def test_a_dead_rank_costs_its_unfinished_samples_only(
    pictures: Path, tiny_t2v: Path, alone: Cache, tmp_path: Path
) -> None:
    """Two of three ranks, one of them killed with a shard half written; then one process alone."""
    processes = [
        wanprep_process(
            *command(tiny_t2v, pictures, tmp_path), cwd=REPOSITORY, RANK=rank, WORLD_SIZE="3"
        )
        for rank in "02"
    ]
    while not list(tmp_path.glob("h*-w002-*.tar.tmp")):
        assert processes[1].poll() is None
        time.sleep(0.002)
    processes[1].kill()
    for process in processes:
        _, err = process.communicate()
    assert processes[0].returncode == 0, err
    assert processes[1].returncode == -signal.SIGKILL
    finished = _writers(tmp_path)
    shares = [
        sum(Rank(number=n, world=3).owns(alone.index.key(row)) for row in range(12))
        for n in range(3)
    ]
    assert finished["w000"] == shares[0] > 0
    assert finished.get("w002", 0) < shares[2]
    assert list(tmp_path.glob("h*-w002-*.tar.tmp"))

    # A rerun with another number of processes encodes the rest, no doubles, and cleans up.
    ran = wanprep(*command(tiny_t2v, pictures, tmp_path))
    assert ran.code == 0, ran.err
    left = 12 - sum(finished.values())
    assert f"{12 - left} in the shards, {left} to encode" in ran.err
    assert sum(_writers(tmp_path).values()) == 12
    assert Cache.open(tmp_path).contents() == alone.contents()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".text-*"))


def test_leftovers_of_a_writer_that_lives_are_left_alone(
    pictures: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    (tmp_path / "h256-w256-f1-w005-00000.tar.tmp").write_bytes(b"half")
    with writer_lock(tmp_path, 5):
        assert wanprep(*command(tiny_t2v, pictures, tmp_path)).code == 0
    assert (tmp_path / "h256-w256-f1-w005-00000.tar.tmp").exists()
    assert wanprep(*command(tiny_t2v, pictures, tmp_path)).code == 0
    assert not (tmp_path / "h256-w256-f1-w005-00000.tar.tmp").exists()


def test_who_may_write_beside_whom(tmp_path: Path) -> None:
    with writer_lock(tmp_path, 0), writer_lock(tmp_path, 1):
        with pytest.raises(UserError, match="another process"), output_lock(tmp_path):
            pass
        with pytest.raises(UserError, match="another process"), writer_lock(tmp_path, 1):
            pass
    with output_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}, (2, 4, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0)),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
    ],
)
def test_what_launchers_say(
    variables: dict[str, str],
    expected: tuple[int, int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UserError, match=r"ranks: RANK="):
            this_rank()
    else:
        rank = this_rank()
        assert (rank.number, rank.world, rank.local) == expected


def test_every_clip_has_one_owner() -> None:
    keys = [f"{n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for n in range(1000)]
    shares = [[key for key in keys if Rank(number=n, world=7).owns(key)] for n in range(7)]
    assert sorted(key for share in shares for key in share) == sorted(keys)
    assert all(100 < len(share) < 190 for share in shares)
