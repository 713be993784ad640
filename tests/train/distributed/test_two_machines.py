"""One run on two machines, the second of which has a bad disk. Machines are launchers on loopback,
each with its own copy of the shards."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.train.strategies.test_strategies import (
    ENDLESS,
    IN_TWO,
    _environment,
    apart,
    command,
    lora_of,
    typed,
)
from tests.train.test_distill import losses

# The second machine's disk: a file decides how it reads.
DISK = """
import os, random, time
from pathlib import Path
here = Path(__file__).parent
def slowly(read):
    def read_slowly(*arguments):
        if (here / "slow").exists():
            time.sleep(random.uniform(0, 0.1))
            (here / "was-slow").touch()
        return read(*arguments)
    return read_slowly
os.pread, os.preadv = slowly(os.pread), slowly(os.preadv)
"""


class Machines:
    """The same command on two machines, of which machine 1 has `DISK`."""

    def __init__(self, model: Path, shards: Path, folder: Path) -> None:
        self.model, self.shards, self.out = model, shards, folder / "out"
        self.others_shards, self.disk = folder / "copy", folder / "disk"
        shutil.copytree(shards, self.others_shards)
        for path in self.others_shards.glob("*.tar"):
            path.chmod(0o644)
        self.disk.mkdir()
        (self.disk / "sitecustomize.py").write_text(DISK)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for rank, shards in enumerate((self.shards, self.others_shards)):
            environment = _environment()
            if rank:
                own = environment.get("PYTHONPATH", "")
                environment["PYTHONPATH"] = f"{self.disk}{os.pathsep}{own}"
            machines = (
                "--num-machines", "2", "--machine-rank", str(rank), "--main-process-port", port
            )  # fmt: skip
            self.started.append(
                subprocess.Popen(
                    command(self.model, shards, self.out, *IN_TWO, *machines, *more),
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def ended(self) -> list[tuple[int, str]]:
        """Exit code and stderr of each."""
        said = [process.communicate(timeout=300)[1] for process in self.started]
        codes = [process.returncode for process in self.started]
        self.started.clear()
        return list(zip(codes, said, strict=True))


@pytest.fixture
def machines(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> Iterator[Machines]:
    two = Machines(tiny_t2v, t2v_shards, tmp_path)
    yield two
    for process in two.started:
        with suppress(ProcessLookupError):
            process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    typed(*command(tiny_t2v, t2v_shards, out, *IN_TWO))
    return out


@pytest.mark.long
def test_a_slow_disk_changes_no_bit(undisturbed: Path, machines: Machines) -> None:
    (machines.disk / "slow").touch()
    machines.start("--dataloader-num-workers", "2")
    assert [code for code, _ in machines.ended()] == [0, 0]
    assert (machines.disk / "was-slow").exists()
    assert losses(machines.out) == losses(undisturbed)
    assert apart(lora_of(machines.out), lora_of(undisturbed)) == 0


@pytest.mark.long
def test_a_shard_that_one_machine_cannot_read(machines: Machines) -> None:
    """Both end at once, each with one message that says why, and the run goes on when it can."""
    machines.start(*ENDLESS, "--strategy", "fsdp")
    _until_saved(machines)
    tars = sorted(machines.others_shards.glob("h*.tar"))
    whole = {tar: tar.read_bytes() for tar in tars}
    for tar in tars:
        os.truncate(tar, 700)
    (_, first), (_, second) = machines.ended()
    assert second.count("error: ") == first.count("error: ") == 1, first + second
    assert "damaged (" in second.partition("error: ")[2] and str(machines.others_shards) in second
    of_second = second.partition("error: process 1: ")[2].strip()
    assert first.partition("error: process 1 ended the run: ")[2].startswith(of_second)
    assert "--resume-from-checkpoint latest" in first

    for tar, content in whole.items():
        tar.write_bytes(content)
    steps = str(_last_saved(machines) + 1)
    machines.start("--max-train-steps", steps, "--resume-from-checkpoint", "latest")
    assert [code for code, _ in machines.ended()] == [0, 0]
    assert _last_saved(machines) == int(steps)


def _last_saved(machines: Machines) -> int:
    names = [path.name.partition("-")[2] for path in machines.out.glob("checkpoint-?*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _until_saved(machines: Machines) -> None:
    deadline = time.monotonic() + 300
    while not _last_saved(machines):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in machines.started)
        time.sleep(0.1)
