"""Steps in processes of their own, until the time is up; after each, all that is known is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu import large, machine, toy, vae
from gpu.large import SMALL, Training
from gpu.place import Place, replace_text

COMMAND = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process."""

    work: Callable[[Place], None]
    seconds: Mapping[int | None, int]
    """Layers (None: all) → about what it takes on an H200 then: the first for which there is time
    is chosen."""
    cap: int
    """Seconds after which it is stopped."""
    needs: str | None = None
    """A package."""


def _training(options: tuple[str, ...] = (), **others: Any) -> Callable[[Place], None]:
    return partial(large.bench, training=Training(options=options, **others))


FIRST: Mapping[str, Step] = {
    "machine": Step(work=machine.machine, seconds={None: 25}, cap=60),
    "toy": Step(work=toy.toy, seconds={None: 50}, cap=90),
    "toy-deterministic": Step(
        work=partial(toy.toy, runs=toy.DETERMINISTIC), seconds={None: 20}, cap=45
    ),
    "a14b": Step(work=_training(), seconds={None: 130, 20: 80, 8: 45}, cap=240),
    "a14b-block": Step(
        work=partial(large.profile_block, training=Training()), seconds={None: 25}, cap=60
    ),
    "a14b-low-vram": Step(
        work=_training(("--low-vram", "--activation-offloading")),
        seconds={None: 170, 20: 90, 8: 45},
        cap=300,
    ),
}


def _lever(*options: str, cap: int = 90, seconds: int = 35, needs: str | None = None) -> Step:
    return Step(work=_training(options), seconds={8: seconds}, cap=cap, needs=needs)


LEVERS: Mapping[str, Step] = {
    "8-blocks": _lever(),
    "8-blocks-cudnn": _lever("--attention-backend", "_native_cudnn"),
    "8-blocks-flash": _lever("--attention-backend", "_native_flash"),
    "8-blocks-flash-attn": _lever("--attention-backend", "flash", needs="flash_attn"),
    "8-blocks-batched-guidance": _lever("--batched-guidance"),
    "8-blocks-fp8": _lever("--base-precision", "fp8"),
    "8-blocks-int8": _lever("--base-precision", "int8"),
    "8-blocks-nf4": _lever("--base-precision", "nf4", needs="bitsandbytes"),
    "8-blocks-compile": _lever("--compile", cap=150, seconds=80),
}
VAE: Mapping[str, Step] = {"vae": Step(work=vae.vae, seconds={None: 60}, cap=240)}
OTHERS: Mapping[str, Step] = {
    **{
        f"a14b-{precision}": Step(
            work=_training(("--base-precision", precision)), seconds={None: 150}, cap=300
        )
        for precision in ("fp8", "int8", "nf4")
    },
    "1.3b": Step(work=_training(published=SMALL), seconds={None: 60}, cap=180),
    "1.3b-in-loop": Step(
        work=partial(large.in_loop, training=Training(published=SMALL)),
        seconds={None: 110},
        cap=300,
        needs="decord",
    ),
}
STEPS: Mapping[str, Step] = {**FIRST, **LEVERS, **VAE, **OTHERS}


@dataclass
class Session:
    """Runs steps, and writes `json_file` after each."""

    folder: Path
    device: str
    quick: bool
    minutes: float
    json_file: Path | None = None
    clip: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)
    """Step → what it found; "left out" says why something is missing."""

    def __post_init__(self) -> None:
        self._end = time.monotonic() + 60 * self.minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def run(self, name: str) -> None:
        """One step, if there is time for it."""
        self.found[name] = self._run(name, STEPS[name])
        if why := self.found[name].get("left out"):
            print(f"{name}: left out: {why}", file=sys.stderr, flush=True)
        if self.json_file is not None:
            replace_text(self.json_file, json.dumps(self.found, indent=2))

    def _run(self, name: str, step: Step) -> dict[str, Any]:
        if step.needs and find_spec(step.needs) is None:
            return {"left out": f"{step.needs} is not installed"}
        left = self.left()
        fitting = [n for n, seconds in step.seconds.items() if seconds <= left or self.quick]
        if not fitting:
            return {"left out": f"{min(step.seconds.values())} s needed, {max(0, left):.0f} s left"}
        print(f"{name} ...", file=sys.stderr, flush=True)
        result, log = self.folder / "result.json", self.folder / "log"
        result.unlink(missing_ok=True)
        command = [
            sys.executable, COMMAND, "--step", name, "--folder", self.folder, "--json", result,
            "--device", self.device, *(["--quick"] if self.quick else []),
            *(["--layers", fitting[0]] if fitting[0] else []),
            *(["--clip", self.clip] if self.clip else []),
        ]  # fmt: skip
        cap = left if self.quick else min(step.cap, left)
        began = time.monotonic()
        with log.open("w") as output:
            why = _ended(list(map(str, command)), self.folder, output, cap)
        found = json.loads(result.read_text()) if result.exists() else {}
        found["process_seconds"] = time.monotonic() - began
        if why:
            print(log.read_text()[-4000:], file=sys.stderr, flush=True)
            found |= {"left out": why, "log": log.read_text()[-1000:], **_updates(self.folder)}
        return found


def _ended(command: list[str], folder: Path, output: Any, cap: float) -> str | None:
    """Run a process and what it starts; why it did not end well, if it did not."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),  # where `wantrain bench` leaves a checkpoint of 6 GB
    }
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=max(1.0, cap))
    except subprocess.TimeoutExpired:
        return f"stopped after {cap:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit code {code}" if code else None


def _updates(folder: Path) -> dict[str, Any]:
    """What a run that was stopped had written of its updates."""
    logs = sorted(folder.glob("wantrain-bench-*/logs/metrics.csv"))
    return {"updates": logs[-1].read_text().splitlines()} if logs else {}
