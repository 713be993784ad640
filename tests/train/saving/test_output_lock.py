"""Two runs into one folder: the second is refused as long as the first lives, however it ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import UserError
from tests.train.test_distill import WANTRAIN, arguments, distill
from train.saving.output_lock import LOCK

ENDLESS = ("--max-train-steps", "50000", "--checkpointing-steps", "50000")


def start(*argv: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [WANTRAIN, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_lock(folder: Path, run: "subprocess.Popen[str]") -> None:
    lock = folder / LOCK
    while not (lock.exists() and lock.read_text()):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)


def test_a_second_run_is_refused_while_the_first_lives(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    long = arguments(tiny_t2v, t2v_shards, out, *ENDLESS, "--report-to", "csv",
                     "--logging-dir", str(tmp_path / "logs"))  # fmt: skip
    first = start(*long)
    try:
        wait_for_lock(out, first)
        wait_for_lock(tmp_path / "logs", first)
        with pytest.raises(UserError) as refused:
            distill(tiny_t2v, t2v_shards, out, "--max-train-steps", "1")
        for part in (f"--output-dir: another run is writing to {out}", f"process {first.pid} of"):
            assert part in str(refused.value)
        with pytest.raises(UserError, match="--logging-dir: another run is writing to"):
            distill(tiny_t2v, t2v_shards, other, "--max-train-steps", "1",
                    "--logging-dir", str(tmp_path / "logs"))  # fmt: skip
        assert not list(other.glob("lora-*"))
        first.send_signal(signal.SIGKILL)
        first.wait()
        distill(tiny_t2v, t2v_shards, out, "--max-train-steps", "1")
        assert list(out.glob("lora-*"))
    finally:
        first.kill()
        first.communicate()


@pytest.mark.long
def test_all_processes_of_a_second_run_end(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(
        *arguments(
            tiny_t2v,
            t2v_shards,
            out,
            "--max-train-steps",
            "50000",
            "--checkpointing-steps",
            "50000",
        )
    )
    try:
        wait_for_lock(out, first)
        second = subprocess.run(
            [
                *(WANTRAIN, *arguments(tiny_t2v, t2v_shards, out, "--max-train-steps", "1")),
                *("--strategy", "ddp", "--num-processes", "2"),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert second.returncode == 1
        assert second.stderr.count("another run is writing to") == 1
    finally:
        first.kill()
        first.communicate()


def test_a_file_system_without_locks_is_said(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    distill(tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1")
    said = " ".join(capsys.readouterr().err.split())
    assert f"note the file system of {tmp_path / 'out'} has no locks" in said
    assert list((tmp_path / "out").glob("lora-*"))


def test_libraries_log_to_the_output_and_not_to_the_terminal(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """A warning, a logger with handlers of its own, errors."""
    talk = (
        "import logging, warnings\n"
        "import train.session as session\n"
        "opened = session.open_session\n"
        "def talking(run, say):\n"
        "    warnings.warn('soft words')\n"
        "    from deepspeed.utils import logger\n"
        "    logger.warning('a banner')\n"
        "    logging.getLogger('accelerate.utils').warning('not passed')\n"
        "    logger.error('a loud fault')\n"
        "    logging.getLogger('accelerate.utils').error('another')\n"
        "    return opened(run, say)\n"
        "import train.loop; train.loop.open_session = talking\n"
        "from train.cli.app import main; main()\n"
    )
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, "-c", talk,
         *arguments(tiny_t2v, t2v_shards, out, "--max-train-steps", "1")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    log = (out / "log.txt").read_text()
    for words in ("soft words", "a banner", "not passed"):
        assert words in log
        assert words not in ran.stdout + ran.stderr
    for words in ("a loud fault", "another"):
        assert words in ran.stdout + ran.stderr
