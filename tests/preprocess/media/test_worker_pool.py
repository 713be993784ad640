"""Decoders that hang, crash or are killed cost their file only, and no process outlives the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess.frames.media_info import MediaError
from preprocess.media.worker_pool import WorkerPool
from shared.cache.background_writer import BackgroundWriter
from tests.preprocess import slow_tasks
from tests.preprocess.conftest import (
    REPOSITORY,
    Cache,
    render_clip,
    wanprep,
    wanprep_process,
    write_metadata,
)

SETTINGS = ("--size", 64, "--video-sample-n-frames", 5, "--device", "cpu")


def command(model: Path, data: Path, output: Path) -> tuple[object, ...]:
    return ("encode", "--model", model, "--train-data-dir", data, "--output", output, *SETTINGS)


@pytest.fixture(scope="module")
def pool() -> "WorkerPool":
    with WorkerPool(2, timeout=60) as pool:
        yield pool


def test_arrays_and_errors_come_back(pool: WorkerPool) -> None:
    expected = np.arange(3 * 5 * 7 * 3, dtype=np.uint8).reshape(3, 5, 7, 3)
    found = pool.submit("x", slow_tasks.ramp, expected.shape).result()
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert found.flags.writeable  # torch.from_numpy warns of others
    with pytest.raises(MediaError, match=r"^x\.mp4: no frames$"):
        pool.submit("x", slow_tasks.fail, "x.mp4: no frames").result()


def test_a_worker_imports_no_torch(pool: WorkerPool) -> None:
    pool.submit("x", slow_tasks.modules).result()
    heavy = {"torch", "diffusers", "transformers", "zarr", "webdataset"}
    assert not heavy & pool.submit("x", slow_tasks.modules).result()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "SIGSEGV")]
)
def test_a_lost_worker_is_replaced(pool: WorkerPool, number: int, name: str) -> None:
    lost = [pool.submit("bad.mp4", slow_tasks.die, number) for _ in range(4)]
    good = [pool.submit("good.mp4", slow_tasks.ramp, (8,)) for _ in range(4)]
    for future in lost:
        with pytest.raises(MediaError, match=rf"^bad\.mp4: the decoder crashed \(.*{name}"):
            future.result()
    assert [future.result().sum() for future in good] == [28] * 4


def test_the_timeout_counts_from_the_last_sign_of_life() -> None:
    with WorkerPool(1, timeout=2) as pool:
        assert pool.submit("slow", slow_tasks.work, 30, 0.1).result() == 30  # 3 s, alive each 0.1
        began = time.monotonic()
        with pytest.raises(MediaError, match="took longer than 2 s and was stopped"):
            pool.submit("stuck", slow_tasks.sleep, 60).result()
        assert time.monotonic() - began < 30
        assert pool.submit("next", slow_tasks.ramp, (3,)).result().sum() == 3


def test_one_that_hangs_does_not_hold_up_the_others() -> None:
    with WorkerPool(2, timeout=60) as pool:
        tasks = [(n, (60.0 if n == 0 else 0.0,)) for n in range(12)]
        done = pool.completed(slow_tasks.sleep, tasks, source=str, ahead=4)
        assert sorted(next(done)[0] for _ in range(11)) == list(range(1, 12))


def test_a_hanging_file_is_rejected_and_the_rest_goes_on(tiny_t2v: Path, tmp_path: Path) -> None:
    """A FIFO: whoever opens it for reading waits for a writer, for ever."""
    data, output = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    render_clip(data / "good.mp4", height=64, width=96, frames=12)
    Image.new("RGB", (64, 64), (9, 200, 30)).save(data / "good.png")
    names = ("pipe.mp4", "pipe.png")
    for name in names:
        os.mkfifo(data / name)
    names += ("good.mp4", "good.png")
    write_metadata(data, [{"file_path": name, "text": name} for name in names])
    ran = wanprep(*command(tiny_t2v, data, output), "--decode-timeout", 3, "--num-workers", 2)
    assert ran.code == 1 and "2 rejected" in ran.err, ran.err
    lines = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert {line["source"]: line["reason"] for line in lines} == {
        name: f"{data / name}: decoding took longer than 3 s and was stopped; --decode-timeout "
        "allows more"
        for name in ("pipe.mp4", "pipe.png")
    }
    assert len(Cache.open(output).index) == 2


def _descendants(process: int) -> set[int]:
    """Processes started by `process`, found while it lives."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == process:
                found.add(int(status.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(number: int, tiny_t2v: Path, tmp_path: Path) -> None:
    """Not even one that is stuck in a decoder, whatever ends the run."""
    data = tmp_path / "data"
    data.mkdir()
    os.mkfifo(data / "pipe.mp4")
    (data / "pipe.txt").write_text("never decoded")
    process = wanprep_process(
        *command(tiny_t2v, data, tmp_path / "shards"), "--num-workers", 2, cwd=REPOSITORY
    )
    # Stuck: the run has begun to look into the media, and there is nothing but the pipe.
    while "0/1" not in _progress(process):
        assert process.poll() is None
    workers = _descendants(process.pid)
    assert len(workers) == 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 30
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_lives, workers))


def _progress(process: "subprocess.Popen[str]") -> str:
    """stderr so far: the next line of it."""
    assert process.stderr is not None
    line = process.stderr.readline()
    if line.startswith("model"):  # the last line before the media are opened
        deadline = time.monotonic() + 30
        while len(_descendants(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)  # so that one of them is in the pipe; earlier would be no failure
        return "0/1"
    return line


def test_a_failed_write_comes_back() -> None:
    """Of the thread that writes, to the loop."""
    program = (
        "import resource, tempfile, pathlib, torch\n"
        "from shared.cache.background_writer import BackgroundWriter\n"
        "from shared.cache.writer import ShardWriter\n"
        "from shared.io.store import Store\n"
        "from shared.format.schema import Sample, SampleInfo\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "info = SampleInfo(caption='a', type='image', source='a', width=64, height=64, frames=1,\n"
        "    frame_indices=[0], fps=None, source_width=64, source_height=64)\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    shards = ShardWriter(Store(pathlib.Path(folder)), {}, shard_bytes=10**9)\n"
        "    writer = BackgroundWriter(shards)\n"
        "    try:\n"
        "        for n in range(100):\n"
        "            writer.add(Sample(key=f'{n:032x}', info=info,\n"
        "                latents=torch.zeros(16, 1, 64, 64), text=torch.zeros(4, 8)))\n"
        "        writer.close()\n"
        "    except OSError as error:\n"
        "        writer.rescue()\n"
        "        print('came back', error.errno, list(pathlib.Path(folder).iterdir()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "came back 27 []\n", done.stderr
    assert BackgroundWriter.__module__ in program
