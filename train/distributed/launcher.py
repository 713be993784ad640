"""Several processes of one run on this machine: started, watched, and ended together.

`torchrun` and `accelerate launch` do as well; but they give processes that are to stop 30 seconds,
in which a large model has not finished its update, and answer a message of ours with a traceback.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared.cli.support import echo
from shared.interrupt import SIGNAL_EXIT, ending_signals

# A process whose partner is gone ends by itself when it waits for it, at the latest here.
GRACE_AFTER_FAILURE_S = 30
_POLL_S = 0.2
# Number of a pipe's end that a process inherits; the other one closes when its launcher is gone.
_LAUNCHER_PIPE = "WANDISTILL_LAUNCHER_PIPE"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where the processes of a run are. Names are those of `accelerate launch`."""

    num_processes: int
    """Over all machines."""
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str = "127.0.0.1"
    main_process_port: int | None = None
    """None: a free one, on one machine."""

    @property
    def here(self) -> int:
        """Processes on each machine."""
        return self.num_processes // self.num_machines


_RESUME = "Resume from the last checkpoint: the same command with --resume-from-checkpoint latest"


def launch(command: Sequence[str], machines: Machines, *, to_go_on: str = _RESUME) -> int:
    """Run `command` once for each process of this machine; the exit code of the run.

    A signal is handed to all. When one process fails, the others are ended. `to_go_on`: what to
    do then.
    """
    processes: list[subprocess.Popen[bytes]] = []
    handed_on: set[int] = set()

    def hand_on(signum: int, _: object) -> None:
        handed_on.add(signum)
        for process in processes:
            process.send_signal(signum)  # nothing where it has ended

    before = {n: signal.signal(n, hand_on) for n in ending_signals()}
    launcher_is_gone, while_open = os.pipe()
    try:
        for environment in _environments(machines):
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment | {_LAUNCHER_PIPE: str(launcher_is_gone)},
                    start_new_session=True,  # a Ctrl-C reaches them once, through us
                    pass_fds=(launcher_is_gone,),
                )
            )
        for signum in list(handed_on):  # it may have come before the last one was there
            hand_on(signum, None)
        code = _wait(processes, machines.machine_rank * machines.here, handed_on, to_go_on)
        return SIGNAL_EXIT - code if code < 0 else code
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(launcher_is_gone)
        os.close(while_open)


def _environments(machines: Machines) -> Iterator[dict[str, str]]:
    """Of each process of this machine, in their order: what `torchrun` would set."""
    port = machines.main_process_port or _free_port()
    threads = max(1, (os.cpu_count() or 1) // machines.here)
    for local_rank in range(machines.here):
        placed = {
            "RANK": machines.machine_rank * machines.here + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": machines.num_processes,
            "LOCAL_WORLD_SIZE": machines.here,
            "MASTER_ADDR": machines.main_process_ip,
            "MASTER_PORT": port,
        }
        own = {name: str(value) for name, value in placed.items()}
        yield {"OMP_NUM_THREADS": str(threads)} | os.environ | own


def _wait(
    processes: Sequence["subprocess.Popen[bytes]"],
    first_rank: int,
    handed_on: set[int],
    to_go_on: str,
) -> int:
    """Until all have ended, or one has failed and the others had their time; 0, or its code.

    `handed_on` are the signals that the processes got from us, of which one may end.
    """
    deadline: float | None = None
    failed = 0
    while True:
        codes = [process.poll() for process in processes]
        if deadline is None and any(codes):
            failed = min(code for code in codes if code)  # one that was killed is the reason
            if failed < 0 and -failed not in handed_on:
                rank = first_rank + codes.index(failed)
                echo(
                    f"error: process {rank} was killed by signal {-failed}; ending the others. "
                    f"{to_go_on}",
                    err=True,
                )
            deadline = time.monotonic() + GRACE_AFTER_FAILURE_S
        if None not in codes:
            return failed
        if deadline is not None and time.monotonic() > deadline:
            ranks = [str(first_rank + n) for n, code in enumerate(codes) if code is None]
            echo(
                f"process {', '.join(ranks)} did not end in {GRACE_AFTER_FAILURE_S} s: killed",
                err=True,
            )
            return failed
        time.sleep(_POLL_S)


def end_with_launcher() -> None:
    """From now on this process gets a SIGTERM when the launcher that started it is gone."""
    if _LAUNCHER_PIPE not in os.environ:
        return
    pipe = int(os.environ.pop(_LAUNCHER_PIPE))

    def wait() -> None:
        os.read(pipe, 1)  # nobody writes: it ends when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_command() -> list[str]:
    """This very command line, as a script: with `-m` a `train.py` in the user's folder would be
    imported."""
    return [sys.executable, *sys.argv]
