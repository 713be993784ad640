"""The line to the other processes ends with the work that it watches."""

import threading
import time

import pytest
import torch.distributed as dist

from train.distributed import failure_report
from train.distributed.failure_report import RollCall


class SlowStore(dist.HashStore):
    """A store on a busy machine."""

    asked = threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.asked.set()
        time.sleep(0.5)
        return super().check(keys)


def test_no_thread_is_in_the_store_when_the_block_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the interpreter's end aborts a process whose run has succeeded."""
    monkeypatch.setattr(failure_report, "_WATCH_S", 0.01)
    store = SlowStore()
    with RollCall(store, 0, 2).watched(lambda rank, why: None):
        assert store.asked.wait(30)
    assert failure_report.WATCH not in [thread.name for thread in threading.enumerate()]
