"""Kill `wanprep` again and again, rerun it, and compare with a run that nobody disturbed.

A session is: encode a dataset; recaption it; edit a caption, take a picture out, add one, encode
again with --prune; recaption again; add i2v conditions; remove a sample; compact. Each try runs it
in a process of its own until that is killed (kill -9), looks at what is left, runs the interrupted
command and the rest again, and compares.

    python benchmarks/kill_many.py points              # die at every write, fsync, rename, removal
    python benchmarks/kill_many.py points --fault enospc    # the disk is full from there on
    python benchmarks/kill_many.py random --tries 1000      # kill -9 from outside, at random times

Processes are forked from one that has imported everything, so a try takes two seconds. Exits
with 1 at the first difference.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from shared.cli.library_log import quiet_libraries  # noqa: E402
from shared.cli.support import run  # noqa: E402

quiet_libraries()  # or DeepSpeed, which the encoders' packages import, writes where our JSON goes

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import preprocess.cache.compact  # noqa: E402 - these are imported before the forks
import preprocess.encode.encoders  # noqa: E402
import preprocess.encode.run  # noqa: E402
import preprocess.overlays.conditions  # noqa: E402
import preprocess.overlays.recaption  # noqa: E402, F401
from preprocess.cli.app import app  # noqa: E402
from shared.io.durable import FAULT  # noqa: E402
from tests.models import tiny_model  # noqa: E402

Contents = dict[str, dict[str, bytes]]
"""Key → member → bytes; of an overlay, FOLDER/KEY."""

OVERLAYS = ("captions/words", "conditions")
REMOVE = 5  # the step
# Live samples after each step: of the cache, captions, conditions.
SAMPLES = (4, 4 + 3, 4 + 2, 4 + 4, 4 + 4 + 4, 3 + 3 + 3, 3 + 3 + 3)


def prepare(folder: Path) -> None:
    """The model and the dataset before and after the edit."""
    tiny_model(folder / "model", "t2v")
    tiny_model(folder / "model-i2v", "i2v")  # with the same VAE
    for name, pictures in (("words-before", (0, 1, 2)), ("words-after", (0, 2, 3, 4))):
        words = [
            {"file_path": f"{n}.png", "text": f"words {n}" + f" {name}" * (n == 0)}
            for n in pictures
        ]
        (folder / f"{name}.json").write_text(json.dumps(words))
    for name, pictures in (("before", (0, 1, 2, 3)), ("after", (0, 2, 3, 4))):
        (folder / name).mkdir()
        for number in pictures:
            numbers = np.random.default_rng(number)
            shape = (64, 64, 3) if number % 2 else (48, 96, 3)
            pixels = numbers.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            edited = " edited" if (name, number) == ("after", 2) else ""
            (folder / name / f"{number}.txt").write_text(f"picture {number}{edited}")


def steps(folder: Path, cache: Path) -> list[list[str]]:
    """The commands of a session."""
    encode = ["encode", "--model", str(folder / "model"), "--output", str(cache), "--size", "64"]
    encode += ["--device", "cpu", "--num-workers", "1", "--train-data-dir"]
    shards = ["--shards", str(cache)]
    recaption = ["recaption", "--name", "words", "--model", str(folder / "model"), *shards]
    recaption += ["--device", "cpu", "--train-data-dir", str(folder / "after")]
    condition = ["add-condition", "--model", str(folder / "model-i2v"), *shards]
    condition += ["--device", "cpu", "--num-workers", "1"]
    return [
        [*encode, str(folder / "before")],
        [*recaption, "--train-data-meta", str(folder / "words-before.json")],
        [*encode, str(folder / "after"), "--prune"],
        [*recaption, "--train-data-meta", str(folder / "words-after.json")],
        [*condition, "--train-data-dir", str(folder / "after")],
        ["remove", *shards, "--sample", "3.png"],
        ["compact", *shards],
    ]


def session(folder: Path, cache: Path, first: int, fault: str = "") -> int:
    """Fork a process that runs the commands from `first` on; its process id.

    The step that it is in stands in `CACHE.step`.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ[FAULT] = fault
        os.environ["WANDISTILL_CACHE"] = str(folder / "hashes")
        for number, words in enumerate(steps(folder, cache)):
            if number >= first:
                begun = cache.with_suffix(".begun")
                begun.write_text(str(number))
                begun.replace(cache.with_suffix(".step"))  # never seen empty, also when killed here
                errors = io.StringIO()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                    try:
                        run(lambda words=words: app(words, standalone_mode=False))
                    except SystemExit as exit_:
                        code = int(exit_.code or 0)
                        cache.with_suffix(".error").write_text(errors.getvalue())
                        os._exit(code)
        code = 0
    except BaseException as error:
        cache.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """Wait; the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(cache: Path) -> Contents:
    """What lives, straight from the specification (shards/README.md), with none of our readers.

    It starts no thread either (zarr would), so that this process can go on forking. Of an overlay
    only what belongs to a sample of the cache.
    """
    found = folder_contents(cache)
    lying = {name: folder_contents(cache / name) for name in OVERLAYS}
    return found | {
        f"{name}/{key}": members
        for name, overlay in lying.items()
        for key, members in overlay.items()
        if key in found
    }


def folder_contents(cache: Path) -> Contents:
    """Of a cache or an overlay, by itself."""

    def age(path: Path) -> tuple[int, int]:
        writer, number = path.stem.split("-")[-2:]
        return int(number), int(writer[1:])

    tars = [path for path in cache.glob("h*.tar") if path.with_suffix(".json").exists()]
    found: Contents = {}
    for path in sorted([*tars, *cache.glob("tombstones-*.json")], key=age):
        if path.suffix == ".json":
            for key in json.loads(path.read_text())["keys"]:
                found.pop(key, None)
            continue
        data = path.read_bytes()
        sidecar = json.loads(path.with_suffix(".json").read_text())
        expect(hashlib.sha256(data).hexdigest() == sidecar["sha256"], f"{path} is damaged")
        shard: Contents = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                stream = tar.extractfile(member)
                expect(stream is not None and suffix not in shard.get(key, {}), member.name)
                shard.setdefault(key, {})[suffix] = stream.read() if stream else b""
        found |= shard
    return found


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def check_left(cache: Path, at: str, undisturbed: list[Contents]) -> int:
    """What an ended session left; the step that it was in."""
    marker = cache.with_suffix(".step")
    step = int(marker.read_text()) if marker.exists() else 0
    if not cache.exists():
        return step
    before = undisturbed[step - 1] if step else {}
    after = undisturbed[step]
    left = contents(cache)
    for key, members in left.items():
        expect(members in (before.get(key), after.get(key)), f"{at}: {key} is neither old nor new")
    lost = (before.keys() & after.keys()) - left.keys()
    expect(not lost, f"{at}: lost {lost}")
    return step


def check_end(cache: Path, at: str, undisturbed: list[Contents]) -> None:
    """After the rerun: the same samples, bytes and nothing beside them."""
    found, wanted = contents(cache), undisturbed[-1]
    expect(found.keys() == wanted.keys(), f"{at}: {sorted(found)} instead of {sorted(wanted)}")
    expect(found == wanted, f"{at}: other bytes")
    for folder in (cache, *(cache / name for name in OVERLAYS)):
        lives = len(folder_contents(folder))
        counts = [json.loads(path.read_text())["count"] for path in folder.glob("h*.json")]
        expect(sum(counts) == lives, f"{at}: {folder}: {counts} samples after compacting")
        manifest = json.loads((folder / "manifest.json").read_text())
        expect(manifest["samples"] == lives, f"{at}: the index of {folder} has other samples")
        tars = {path.stem for path in folder.glob("*.tar")}
        sidecars = {p.stem for p in folder.glob("*.json")} - {"manifest"}
        expect(tars == sidecars, f"{at}: {folder}: {tars ^ sidecars} is half there")
        strange = [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
        expect(not strange, f"{at}: {folder}: {strange} left over")


def attempt(
    folder: Path, at: str, undisturbed: list[Contents], disturbed: Callable[[Path], int]
) -> bool:
    """One disturbed session and its rerun; whether the disturbance came before the end."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.with_suffix(".step").unlink(missing_ok=True)
    code = disturbed(cache)
    if code == 0:
        check_end(cache, at, undisturbed)
        return False
    if code != -signal.SIGKILL:
        said = cache.with_suffix(".error").read_text()
        explained = "error: " in said and "make room" in said and "Traceback" not in said
        expect(code == 1 and explained, f"{at}: exit {code}: {said}")
    step = check_left(cache, at, undisturbed)
    if step == REMOVE and contents(cache) == undisturbed[REMOVE]:
        step += 1  # what is removed already cannot be named again
    code = finish(session(folder, cache, step))
    expect(code == 0, f"{at}: the rerun ended with {code}: {_error(cache)}")
    check_end(cache, at, undisturbed)
    return True


def _error(cache: Path) -> str:
    path = cache.with_suffix(".error")
    return path.read_text() if path.exists() else ""


def main() -> None:
    """Parse the command line and try."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("how", choices=("points", "random"))
    parser.add_argument("--fault", choices=("kill", "enospc"), default="kill")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth point only")
    parser.add_argument("--tries", type=int, default=20, metavar="N", help="kills at random times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no try after that time")
    arguments = parser.parse_args()
    begun = time.monotonic()

    def late() -> bool:
        minutes = arguments.minutes
        return minutes is not None and time.monotonic() - begun > 60 * minutes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: nothing but imports may have happened when we fork.
        child = os.fork()
        if not child:
            prepare(folder)
            os._exit(0)
        finish(child)

        undisturbed, plain = [], folder / "undisturbed"
        for step in range(len(SAMPLES)):
            words = steps(folder, plain)
            child = os.fork()
            if not child:
                os.environ["WANDISTILL_CACHE"] = str(folder / "hashes")
                with contextlib.redirect_stdout(io.StringIO()):
                    run(lambda words=words[step]: app(words, standalone_mode=False))
                os._exit(0)
            expect(finish(child) == 0, f"the undisturbed session fails at step {step}")
            undisturbed.append(contents(plain))
        found = tuple(len(one) for one in undisturbed)
        expect(found == SAMPLES, f"{found} samples, expected {SAMPLES}")
        expect(undisturbed[-2] == undisturbed[-1], "compacting changed something")
        lying = sum(len(folder_contents(plain / name)) for name in OVERLAYS)
        expect(len(folder_contents(plain)) + lying == SAMPLES[-1], "an orphan was not compacted")

        log = folder / "points.log"
        started = time.monotonic()
        expect(finish(session(folder, folder / "counted", 0, f"log@{log}")) == 0, "counting fails")
        seconds = time.monotonic() - started
        points = log.read_text().splitlines()

        tried = hit = 0
        if arguments.how == "points":
            for number in range(1, len(points) + 1, arguments.every):
                if late():
                    break
                fault = f"{arguments.fault}@{number}"
                hit += attempt(
                    folder,
                    f"{fault} ({points[number - 1]})",
                    undisturbed,
                    lambda cache, fault=fault: finish(session(folder, cache, 0, fault)),
                )
                tried += 1
        else:
            moments = random.Random(arguments.seed)
            for _ in range(arguments.tries):
                if late():
                    break
                tried += 1
                delay = moments.uniform(0, seconds)

                def killed(cache: Path, delay: float = delay) -> int:
                    child = session(folder, cache, 0)
                    time.sleep(delay)
                    os.kill(child, signal.SIGKILL)
                    return finish(child)

                hit += attempt(folder, f"kill -9 after {delay:.3f} s", undisturbed, killed)
    result = {"how": arguments.how, "points": len(points), "tried": tried, "interrupted": hit}
    print(json.dumps(result | {"failed": 0, "seconds": round(time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
