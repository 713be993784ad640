"""The toy on the GPU against itself on the CPU: the same runs, update by update."""

import csv
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.place import Place, first_line

PLAIN = "plain"
RUNS: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "plain again": (),
    "fp32": ("--mixed-precision", "no"),
    "low-vram, offloading": ("--low-vram", "--activation-offloading"),
    "int8": ("--base-precision", "int8"),
    "fp8": ("--base-precision", "fp8"),
    "nf4": ("--base-precision", "nf4"),
    "8-bit Adam": ("--use-8bit-adam",),
    "ddp": ("--strategy", "ddp"),
    "fsdp": ("--strategy", "fsdp"),
}
DETERMINISTIC: Mapping[str, tuple[str, ...]] = {
    "deterministic": ("--deterministic",),
    "deterministic again": ("--deterministic",),
}
"""In a process of their own: cuBLAS reads what it needs for this at its first matmul."""
ON_CPU = {"low-vram, offloading": PLAIN, "ddp": PLAIN, "fsdp": PLAIN, "deterministic": PLAIN}
"""Which of them is compared with the CPU's losses of another, in place of its own."""


def toy(place: Place, runs: Mapping[str, tuple[str, ...]] = RUNS) -> None:
    """Losses of each run, and the largest difference from the CPU's, relative to the loss."""
    from random_cache import write_cache

    from shared.format.buckets import Bucket
    from shared.models.toy_model import toy_folder

    write_cache(place.folder / "toy", toy_folder("toy"), Bucket(64, 64, 17), 4, shard_mb=1)
    found: dict[str, Any] = {}
    on_cpu: dict[str, Any] = {}
    for name, options in runs.items():
        base = name.removesuffix(" again")
        reference = ON_CPU.get(base, base)
        if reference not in on_cpu:
            on_cpu[reference] = _trained(place, RUNS[reference], "cpu")
        mine = _trained(place, options, place.device)
        found[name] = _compared(mine, on_cpu[reference])
        first = found[base]
        if name != base and {"lora"} <= found[name].keys() & first.keys():
            found[name]["equal_bits"] = all(mine[key] == first[key] for key in ("losses", "lora"))
        place.keep({"runs": found})
    if runs is RUNS:
        found["bench"] = _bench(place)
        place.keep({"runs": found})


def _options(place: Place, device: str) -> list[str]:
    shards = str(place.folder / "toy")
    return [
        "--model", "toy", "--shards", shards, "--device", device, "--boundary-type", "full",
        "--train-batch-size", "2", "--rank", "8", "--gen-update-interval", "1",
        "--report-to", "csv", "--learning-rate", "1e-4", "--learning-rate-critic", "1e-4",
    ]  # fmt: skip


def _trained(place: Place, options: tuple[str, ...], device: str) -> dict[str, Any]:
    """Losses of the updates of one run and a digest of its LoRA; or why there are none."""
    from train.cli.app import app

    output = place.folder / "toy-run"
    shutil.rmtree(output, ignore_errors=True)
    steps = "1" if place.quick else "3"
    arguments = ["distill", *_options(place, device), "--max-train-steps", steps, *options]
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    port = {"MASTER_PORT": str(29500 + os.getpid() % 2000)}
    if "--strategy" in options:
        os.environ |= launched | port
    try:
        app([*arguments, "--output-dir", str(output)], standalone_mode=False)
    except (Exception, SystemExit) as error:  # a run that fails is a result
        return {"left out": first_line(error)}
    finally:
        for variable in launched | port:
            os.environ.pop(variable, None)
    lora = (output / "lora-full-diffusers.safetensors").read_bytes()
    return {"losses": _losses(output), "lora": hashlib.sha256(lora).hexdigest()}


def _losses(output: Path) -> list[float]:
    with (output / "logs" / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [float(v) for row in rows for k, v in row.items() if k.startswith("loss/") and v]


def _compared(mine: dict[str, Any], cpu: dict[str, Any]) -> dict[str, Any]:
    if "left out" in mine:
        return mine
    if "left out" in cpu:
        return {**mine, "cpu": cpu["left out"]}
    pairs = zip(mine["losses"], cpu["losses"], strict=True)
    return {**mine, "difference": max(abs(a - b) / abs(b) for a, b in pairs)}


def _bench(place: Place) -> dict[str, Any]:
    from train.cli.app import app

    result = place.folder / "toy-bench.json"
    try:
        arguments = ["bench", *_options(place, place.device), "--json", str(result)]
        app(arguments, standalone_mode=False)
    except (Exception, SystemExit) as error:
        return {"left out": first_line(error)}
    return {"report": result.read_text()}
