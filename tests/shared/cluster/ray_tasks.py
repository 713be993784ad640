"""An actor for `Fleet` whose items say what becomes of it. Imported by Ray's workers: no torch."""

import os
import signal
import socket
import time
from pathlib import Path

import ray

from shared.cluster.fleet import Joined
from shared.errors import UserError


class Clerk:
    """Writes one file per item; keeps those of its last lease for `finish`, as an open shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[str] = []

    def start(self) -> Joined:
        node = ray.get_runtime_context().get_node_id()
        if (self._folder / "no start").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return Joined(host=socket.gethostname(), node=node, pid=os.getpid(), writer=None)

    def work(self, items: list[str]) -> dict[int, str]:
        self.finish(rescue=False)
        rejected: dict[int, str] = {}
        for position, item in enumerate(items):
            kind = item.split("-")[0]
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "raise":
                raise RuntimeError(f"device-side assert in {item}")
            elif kind == "full":
                raise OSError(28, "No space left on device")
            elif kind == "user":
                raise UserError("node x: no such model")
            elif kind == "bad":
                rejected[position] = f"{item}: cannot decode"
            elif kind == "slow":
                time.sleep(3)
            else:
                self._open.append(item)
        return rejected

    def finish(self, rescue: bool) -> None:
        for item in self._open:
            with (self._folder / item).open("a") as file:  # twice written is twice as long
                file.write("x")
        self._open = []
