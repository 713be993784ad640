"""What the tests run in worker processes: real functions that sleep, crash or return frames."""

import os
import sys
import time

import numpy as np

from preprocess.frames.media_info import MediaError
from preprocess.media.worker_process import alive


def ramp(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)


def fail(reason: str) -> None:
    raise MediaError(reason)


def modules() -> set[str]:
    """Top-level packages that this process has imported."""
    return {name.split(".")[0] for name in sys.modules}


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def work(steps: int, seconds: float) -> int:
    for _ in range(steps):
        time.sleep(seconds)
        alive()
    return steps


def sleep(seconds: float) -> None:
    time.sleep(seconds)
