"""Worker processes for what may hang or crash: decoders, on files of any origin.

A pool of processes that can be killed one by one. Each belongs to one thread of this process, which
hands it a task, waits for the answer with a time-out, and starts another where one was lost. So a
file that hangs, crashes or eats the decoder costs itself, not the run.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.reduction import recv_handle
from typing import Any, TypeVar

import numpy as np

from preprocess.frames.media_info import MediaError
from preprocess.media.worker_process import ALIVE, ARRAY, FAILED
from shared.errors import UserError

Item = TypeVar("Item")
Results = Generator[tuple[Item, "Future[Any]"], None, None]
"""Items with their futures, each done; `close` cancels what has not begun."""

PRELOAD = ("preprocess.media.decode",)
"""What a worker imports before it says that it is ready."""
_START_SECONDS = 300
"""A worker that is not ready by then never will be (it takes less than one)."""
_MOST_WORKERS = 8


def default_workers(processes_on_machine: int = 1) -> int:
    """Decoders for one encoder: a core each, one left for the encoder."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_WORKERS, (cores or 1) // processes_on_machine - 1))


class WorkerPool:
    """Runs functions in worker processes; a context manager that leaves none behind.

    Workers start at once, so that their start-up hides behind what the caller does next.
    """

    def __init__(self, workers: int, *, timeout: float) -> None:
        """`timeout`: seconds that a task may take (`worker_process.alive` starts them anew)."""
        self.workers = workers
        self.busy = 0.0
        """Seconds that tasks have taken so far, summed over the workers."""
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._own = threading.local()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(workers):  # one each: a thread is busy until its worker is ready
            self._threads.submit(self._worker)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *failure: object) -> None:
        """Kill every worker, whatever it is doing."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.release()

    def submit(
        self, source: object, function: Callable[..., Any], *arguments: Any
    ) -> "Future[Any]":
        """Run `function(*arguments)` in a worker; `source` is the file, for messages.

        The function must be importable from its module, and is best defined where little is
        imported. The future raises what the function raised, or MediaError where the worker was
        lost or took too long. An array comes back in shared memory, not copied through a pipe.
        """
        return self._threads.submit(self._run, source, function, arguments)

    def completed(
        self,
        function: Callable[..., Any],
        items: Iterable[tuple[Item, tuple[Any, ...]]],
        *,
        source: Callable[[Item], object],
        ahead: int,
    ) -> Results[Item]:
        """Run `function` on each item's arguments, at most `ahead` items before the consumer.

        Items come as they are done, the oldest first, so one that hangs does not hold up the
        others. The first tasks begin when the iterator is made, not at the first `next`.
        """
        remaining = iter(items)

        def submitted(number: int) -> list[tuple[Item, "Future[Any]"]]:
            return [
                (item, self.submit(source(item), function, *arguments))
                for item, arguments in islice(remaining, number)
            ]

        def results(queue: list[tuple[Item, "Future[Any]"]]) -> Results[Item]:
            try:
                while queue:
                    wait([future for _, future in queue], return_when=FIRST_COMPLETED)
                    first = next(n for n, (_, future) in enumerate(queue) if future.done())
                    yield queue.pop(first)
                    queue += submitted(1)
            finally:
                for _, future in queue:
                    future.cancel()

        return results(submitted(ahead))

    def _run(self, source: object, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        worker = self._worker()
        began = time.perf_counter()
        try:
            return worker.run(function, arguments, self._timeout)
        except _LostError as lost:
            self._drop(worker)
            raise MediaError(f"{source}: {lost}") from None
        finally:
            with self._lock:
                self.busy += time.perf_counter() - began

    def _worker(self) -> "_Worker":
        """This thread's worker, started where there is none."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            with self._lock:
                if self._closed:
                    raise MediaError("the run is ending")
                worker = _Worker()
                self._all.add(worker)
            try:
                worker.wait_until_ready()
            except BaseException:
                self._drop(worker)
                raise
            self._own.worker = worker
        return worker

    def _drop(self, worker: "_Worker") -> None:
        self._own.worker = None
        worker.kill()
        worker.release()
        with self._lock:
            self._all.discard(worker)


class _LostError(Exception):
    """Why a worker gave no answer."""


class _Worker:
    """One process and the line to it. Used by one thread; `kill` by any."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `release`
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = (
            f"import sys; sys.path[:] = {json.dumps(path)}\n"
            "from wandistill_cli import ours_first; ours_first()\n"
            "from preprocess.media.worker_process import main\n"
            f"main({theirs.fileno()}, {os.getpid()}, {PRELOAD!r})\n"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                # Or numpy starts a thread a core, in every worker.
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )

    def wait_until_ready(self) -> None:
        """UserError where the process does not come up."""
        try:
            with self._while_it_lives():
                self._receive(_START_SECONDS)
        except _LostError as lost:
            raise UserError(
                f"decoding: a worker process did not start ({lost}). Is there memory for "
                "--num-workers of them?"
            ) from lost

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> Any:
        """The function's result; what it raises is raised. _LostError: the process is of no use."""
        with self._while_it_lives():
            self._connection.send((function, arguments))
            while (answer := self._receive(timeout))[0] == ALIVE:
                pass
            kind, content = answer
            result = self._array(*content) if kind == ARRAY else content
        if kind == FAILED:
            raise result
        return result

    @contextmanager
    def _while_it_lives(self) -> Iterator[None]:
        """Block that talks to the process. _LostError, with its exit reason, if that breaks."""
        try:
            yield
        except (EOFError, OSError):
            raise _LostError(self._exit_reason()) from None

    def _receive(self, timeout: float) -> tuple[Any, ...]:
        if not self._connection.poll(timeout):
            raise _LostError(
                f"decoding took longer than {timeout:g} s and was stopped; --decode-timeout "
                "allows more"
            )
        answer: tuple[Any, ...] = self._connection.recv()
        return answer

    def _array(self, shape: tuple[int, ...], dtype: str) -> Any:
        descriptor = recv_handle(self._connection)
        try:
            memory = mmap.mmap(descriptor, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        finally:
            os.close(descriptor)
        return np.ndarray(shape, dtype, buffer=memory)  # which frees the map when it goes

    def _exit_reason(self) -> str:
        """How the process ended, with the last line that it wrote."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        how = f"code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        if code == -signal.SIGKILL:
            how += "; the system was perhaps out of memory"
        with suppress(OSError, ValueError):
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            how += f"; {lines[-1]}" if lines else ""
        return f"the decoder crashed ({how})"

    def kill(self) -> None:
        """End the process at once; its thread then sees the line break."""
        self._process.kill()

    def release(self) -> None:
        """Leave no zombie and no open file."""
        self._process.wait()
        self._connection.close()
        self._stderr.close()
