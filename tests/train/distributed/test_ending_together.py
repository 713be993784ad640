"""How the processes of one run end: with their launcher, with a signal, with the first that fails.

Real processes, joined as a run's are, but with less to do than training.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from tests.train.test_distill import WANTRAIN, arguments
from train.distributed.options import ProcessOptions
from train.distributed.placement import Placement, place

LAUNCH = """
import sys
from train.distributed.launcher import Machines, launch
sys.exit(launch([sys.executable, *sys.argv[1:]], Machines(num_processes=2)))
"""
# Says that it is there, and which signal it got.
WAITS = """
import os, signal, sys, time
from pathlib import Path
from train.distributed.launcher import end_with_launcher
me = Path(sys.argv[1], os.environ["RANK"])
def told(signum, _):
    me.with_suffix(".told").write_text(str(signum))
    sys.exit(128 + signum)
for number in (signal.SIGTERM, signal.SIGHUP) if "asks" in sys.argv else ():
    signal.signal(number, told)
end_with_launcher()
me.write_text(str(os.getpid()))
time.sleep(120)
"""


def _launched(
    folder: Path, program: str, *words: str, launch: str = LAUNCH
) -> tuple["subprocess.Popen[str]", list[int]]:
    """A launcher, and the numbers of its two processes once they say that they are there."""
    (folder / "launch.py").write_text(launch)
    (folder / "program.py").write_text(program)
    launcher = subprocess.Popen(
        [sys.executable, "launch.py", "program.py", str(folder), *words],
        cwd=folder, env=_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    there = [folder / "0", folder / "1"]
    _until(lambda: all(path.exists() and path.read_text() for path in there))
    return launcher, [int(path.read_text()) for path in there]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_processes_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher, processes = _launched(tmp_path, WAITS, "asks")
    launcher.kill()
    launcher.communicate()
    _until(lambda: not any(map(_alive, processes)))
    for rank in ("0.told", "1.told"):  # so that they save what they have
        assert (tmp_path / rank).read_text() == str(int(signal.SIGTERM))


def test_a_closed_terminal_reaches_all(tmp_path: Path) -> None:
    launcher, _ = _launched(tmp_path, WAITS, "asks")
    launcher.send_signal(signal.SIGHUP)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGHUP
    for rank in ("0.told", "1.told"):
        assert (tmp_path / rank).read_text() == str(int(signal.SIGHUP))


def test_a_stop_while_processes_start_is_no_fault(tmp_path: Path) -> None:
    launcher, processes = _launched(tmp_path, WAITS)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (128 + signal.SIGTERM, "")
    assert not any(map(_alive, processes))


def test_one_that_is_killed_is_named_though_nobody_outlives_it(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text(LAUNCH.replace("num_processes=2", "num_processes=1"))
    (tmp_path / "program.py").write_text("import os; os.kill(os.getpid(), 9)")
    ran = subprocess.run(
        [sys.executable, "launch.py", "program.py"], cwd=tmp_path, env=_environment(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 128 + signal.SIGKILL
    assert "error: process 0 was killed by signal 9" in ran.stderr


FAILS = """
import os, sys
from pathlib import Path
import torch
from shared.cli.support import run
from shared.errors import UserError
from train.distributed.process_group import joined, launched
def first():
    raise OSError(28, "No space left on device", "checkpoint-1")
def work():
    ranks = launched()
    with joined(ranks, torch.device("cpu")):
        Path(sys.argv[1], str(ranks.rank)).write_text(str(os.getpid()))
        if sys.argv[2] == "first":
            ranks.first_does(first)
        if ranks.rank == 1:
            raise UserError("shards: one.tar is damaged.")
        ranks.gathered(1.0)
run(work)
"""


def test_what_fails_in_one_process_is_said_once(tmp_path: Path) -> None:
    launcher, _ = _launched(tmp_path, FAILS, "second")
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (1, "error: process 1: shards: one.tar is damaged.\n")


# The first process waits as in a collective of NCCL: it can't notice.
DEAF = FAILS.replace(
    "        ranks.gathered(1.0)\n", "        __import__('time').sleep(1000)\n"
).replace("def first", "import train.distributed.failure_report as report\n"
          "report.NOTICES_BY_ITSELF_S = 1\ndef first", 1)  # fmt: skip


def test_one_that_can_not_notice_the_end_of_another_ends_too(tmp_path: Path) -> None:
    long = LAUNCH.replace("import sys\n", "import sys, train.distributed.launcher as it\n")
    long = long.replace("sys.exit", "it.GRACE_AFTER_FAILURE_S = 1000\nsys.exit")
    launcher, processes = _launched(tmp_path, DEAF, "second", launch=long)
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (1, "error: process 1: shards: one.tar is damaged.\n")
    assert not any(map(_alive, processes))


# `wantrain`, whose second process fails in its second update, while the first waits for it.
FAULT = """
import os, sys
import train.methods.dmd as it
real, calls = it.regression_loss, []
def struck(*arguments):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 2:
        raise RuntimeError("injected")
    return real(*arguments)
it.regression_loss = struck
from train.cli.app import main
main()
"""


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_a_fault_in_the_middle_of_a_run_ends_all_within_a_minute(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, strategy: str
) -> None:
    (tmp_path / "program.py").write_text(FAULT)
    out = tmp_path / "out"
    words = arguments(tiny_t2v, t2v_shards, out, "--max-train-steps", "9",
                      "--checkpointing-steps", "1", "--strategy", strategy)  # fmt: skip
    ran = subprocess.run(
        [sys.executable, tmp_path / "program.py", *words, "--num-processes", "2"],
        env=_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "error: process 1 failed" in ran.stderr and "RuntimeError: injected" in ran.stderr
    assert not _children_of(str(tmp_path / "program.py"))
    checkpoints = sorted(path.name for path in out.glob("checkpoint-*"))
    # One update was whole. Where the first process has all, it saves it.
    assert checkpoints == (["checkpoint-0+1"] if strategy == "ddp" else [])


def _children_of(script: str) -> list[str]:
    """Command lines of processes that run it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            found += [" ".join(words)] if script in words else []
    return found


def test_what_fails_in_the_first_process_ends_the_others_silently(tmp_path: Path) -> None:
    launcher, _ = _launched(tmp_path, FAILS, "first")
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert said.count("Traceback") == 1 and "[rank1]" not in said
    assert "No space left on device: 'checkpoint-1'" in said


def test_what_fails_on_another_machine_is_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = []
    (tmp_path / "program.py").write_text(FAILS)
    for machine in (0, 1):
        where = f"num_processes=2, num_machines=2, machine_rank={machine}, main_process_port={port}"
        script = tmp_path / f"launch-{machine}.py"
        script.write_text(LAUNCH.replace("num_processes=2", where))
        launchers.append(
            subprocess.Popen(
                [sys.executable, script.name, "program.py", str(tmp_path), "second"],
                cwd=tmp_path, env=_environment(), stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert said[1] == "error: process 1: shards: one.tar is damaged.\n"
    assert said[0].startswith("error: process 1 ended the run: shards: one.tar is damaged. Resume")
    assert said[0].count("\n") == 1


HANGS = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
import torch
from dataclasses import replace
from shared.cli.support import run
from train.distributed.process_group import joined, launched
def work():
    ranks = replace(launched(), timeout=timedelta(seconds=3))
    with joined(ranks, torch.device("cpu")):
        ranks.gathered(1.0)
        Path(sys.argv[1], str(ranks.rank)).write_text(str(os.getpid()))
        if ranks.rank == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.gathered(1.0)
run(work)
"""


@pytest.mark.parametrize(
    ("stopped", "speaks", "names"),
    [
        (1, 0, r"process 1 \(pid {pid} on \S+\)"),
        # The store at which they met hangs with it.
        pytest.param(0, 1, "process 0, or its machine", marks=pytest.mark.long),
    ],
)
def test_one_that_hangs_ends_all_and_is_named(
    tmp_path: Path, stopped: int, speaks: int, names: str
) -> None:
    few = LAUNCH.replace("import sys\n", "import sys, train.distributed.launcher as it\n")
    few = few.replace("sys.exit", "it.GRACE_AFTER_FAILURE_S = 2\nsys.exit")
    launcher, processes = _launched(tmp_path, HANGS, str(stopped), launch=few)
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    named = names.format(pid=processes[stopped])
    waited = rf"error: process {speaks} waited 3 s \(--ddp-timeout\) for {named}: it hangs"
    assert re.match(waited, said), said
    assert "--ddp-timeout 9" in said and "--resume-from-checkpoint latest" in said
    assert said.endswith(f"process {stopped} did not end in 2 s: killed\n")
    assert not any(map(_alive, processes))


def test_a_full_disk_is_one_message(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    """Full for files above 40 kB: the LoRA of a checkpoint, and nothing before."""
    words = arguments(tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1")
    ran = subprocess.run(
        [WANTRAIN, *words, "--rank", "16"], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )  # fmt: skip
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert f"error: --output-dir: can't write to {tmp_path / 'out'} (File too large)" in ran.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def _placed(device: str, processes: int, ddp_timeout: int = 60) -> Placement:
    options = ProcessOptions(num_processes=processes, ddp_timeout=ddp_timeout, device=device)
    return place("ddp", options)[1]


def test_each_process_takes_its_gpu_or_the_only_one_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slurm's --gpus-per-task=1 shows each task one GPU, number 0 whatever its local rank."""
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    for gpus, device in ((1, "cuda:0"), (2, "cuda:1"), (4, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert _placed("cuda", 8).device == device
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match=r"process 5 is number 4 of its machine.*4 GPUs"):
        _placed("cuda", 8)


def test_a_gpu_for_each_process_or_none_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpus = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"--num-processes: found {gpus + 1}.*has {gpus} GPU"):
        _placed("cuda", gpus + 1)
    with pytest.raises(UserError, match=r"--device: found cuda:1 with 2 processes"):
        _placed("cuda:1", 2)
    with pytest.raises(UserError, match=r"--device: found 'qpu'"):
        _placed("qpu", 2)
    with pytest.raises(UserError, match=r"--ddp-timeout: found 0, expected seconds, 1 or more"):
        _placed("cpu", 2, ddp_timeout=0)
    assert _placed("cpu", 2).to_launch
