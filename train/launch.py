"""Several processes of one run on this machine: started, watched, and ended together.

`torchrun` and `accelerate launch` do as well; but they give processes that are to stop 30 seconds,
in which a large model has not finished its update, and answer a message of ours with a traceback.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shared.cli_support import echo
from shared.interrupt import SIGNAL_EXIT

# A process whose partner is gone ends by itself when it waits for it, at the latest here.
GRACE_AFTER_FAILURE_S = 30
_POLL_S = 0.2


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


def launch(command: Sequence[str], machines: Machines) -> int:
    """Run `command` once for each process of this machine; the exit code of the run.

    A signal is handed to all. When one process fails, the others are ended.
    """
    port = machines.main_process_port or _free_port()
    threads = max(1, (os.cpu_count() or 1) // machines.here)
    processes = []
    for local_rank in range(machines.here):
        environment = (
            {"OMP_NUM_THREADS": str(threads)}
            | os.environ
            | {
                "RANK": str(machines.machine_rank * machines.here + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(machines.num_processes),
                "LOCAL_WORLD_SIZE": str(machines.here),
                "MASTER_ADDR": machines.main_process_ip,
                "MASTER_PORT": str(port),
            }
        )
        # Sessions of their own: a Ctrl-C reaches them once, through us.
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def hand_on(signum: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes, first_rank=machines.machine_rank * machines.here)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence["subprocess.Popen[bytes]"], first_rank: int) -> int:
    """Until all have ended, or one has failed and the others had their time."""
    deadline: float | None = None
    failed = 0
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if deadline is None and any(codes):
            failed = next(code for code in codes if code)
            rank = first_rank + codes.index(failed)
            how = f"was killed by signal {-failed}" if failed < 0 else f"ended with code {failed}"
            if failed < 0:
                echo(
                    f"error: process {rank} {how}; ending the others. Go on from the last "
                    "checkpoint: the same command with --resume-from-checkpoint latest",
                    err=True,
                )
            deadline = time.monotonic() + GRACE_AFTER_FAILURE_S
        if deadline is not None and time.monotonic() > deadline:
            return _exit_code(failed)
        time.sleep(_POLL_S)
    codes = [process.wait() for process in processes]
    return _exit_code(failed or next((code for code in codes if code), 0))


def _exit_code(code: int) -> int:
    return SIGNAL_EXIT - code if code < 0 else code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_command() -> list[str]:
    """This very command line, as a script: with `-m` a `train.py` in the user's folder would be
    imported."""
    return [sys.executable, *sys.argv]
