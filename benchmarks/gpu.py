"""Wan at true sizes on one GPU: memory, time, how much of it is the transformer's, MFU.

    python benchmarks/gpu.py                            # one 80 GB card; under 9 minutes
    python benchmarks/gpu.py --only a14b-fp8 a14b-nf4   # these configurations instead
    python benchmarks/gpu.py --quick                    # that all of it runs, tiny, also on a CPU

832 × 480 × 81, one sample, LoRAs of rank 64, one critic update and one generator update after two
that warm up. Weights are random, of the published shapes and in bf16; nothing is downloaded. There
is no 1.3B model for image to video: "1.3b" is Wan2.1-T2V-1.3B; "a14b" is the low-noise expert of
Wan2.2-I2V-A14B. Each configuration is `wantrain bench` in a process of its own, on a cache that
stage one's writer wrote. Most valuable first: what the minutes left would not do is left out, and
says so.

Beside them "1.3b-in-loop": what a trainer without a cache holds and does, as VideoX-Fun's script:
a transformer each for teacher, generator and critic, VAE (bf16) and UMT5-XXL, and a clip decoded
and encoded in every update. Of A14B that does not fit; the bytes of its weights are counted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
sys.path.insert(0, str(ROOT))

GIB = 2**30
LEAST_FREE = 12 * 10**9
"""Bytes that must be left on the disk: a checkpoint of a run of A14B has 6."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One of the models."""

    published: str
    component: str
    make_seconds: int
    """About what writing its weights takes."""


SIZES = {
    "a14b": Size(published="wan2.2-i2v-a14b", component="transformer_2", make_seconds=60),
    "1.3b": Size(published="wan2.1-t2v-1.3b", component="transformer", make_seconds=10),
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One measurement."""

    size: str
    seconds: int
    """About what it takes on an H100, to plan with."""
    options: tuple[str, ...] = ()
    step: str = "bench"


LEVERS: Mapping[str, tuple[str, ...]] = {
    "fp8": ("--base-precision", "fp8"),
    "int8": ("--base-precision", "int8"),
    "nf4": ("--base-precision", "nf4"),
    "compile": ("--compile",),
    "batched-guidance": ("--batched-guidance",),
    "low-vram": ("--low-vram",),
    "activation-offloading": ("--activation-offloading",),
    "no-checkpointing": ("--no-gradient-checkpointing",),  # 98 GiB for 1.3b, 330 for a14b
}
BY_DEFAULT = ("a14b", "1.3b", "1.3b-in-loop")
"""What fits the time; the others are for `--only`."""


def configurations() -> dict[str, Configuration]:
    """By name, most valuable first, those of a model together."""
    found = {"a14b": Configuration(size="a14b", seconds=240)}
    for name, options in LEVERS.items():
        found[f"a14b-{name}"] = Configuration(size="a14b", seconds=240, options=options)
    found["1.3b"] = Configuration(size="1.3b", seconds=60)
    found["1.3b-in-loop"] = Configuration(size="1.3b", seconds=110, step="in-loop")
    for name, options in LEVERS.items():
        found[f"1.3b-{name}"] = Configuration(size="1.3b", seconds=60, options=options)
    return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where things lie, and how large they are."""

    folder: Path
    device: str
    quick: bool
    clip: Path | None = None
    """What in-loop training decodes; None: one is made."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def clips(self) -> Path:
        return self.folder / "clips"

    def bucket(self) -> Any:
        from shared.format.buckets import Bucket

        return Bucket(32, 64, 9) if self.quick else Bucket(480, 832, 81)

    def published(self, size: str) -> Any:
        """The model; quick: two narrow layers of it, and a small VAE."""
        from shared.models.wan import PUBLISHED

        model = PUBLISHED[SIZES[size].published]
        if not self.quick:
            return model
        vae = {**model.vae, "base_dim": 8, "num_res_blocks": 1}
        return replace(model, heads=1, ffn_dim=64, layers=2, vae=vae)

    def options(self, configuration: Configuration) -> list[str]:
        """Of `wantrain distill`."""
        return [
            "--model", str(self.model), "--shards", str(self.cache), "--device", self.device,
            "--rank", "8" if self.quick else "64", "--gen-update-interval", "1",
            *configuration.options,
        ]  # fmt: skip


def machine(place: Place, configuration: Configuration, result: Path) -> None:
    """What the card and the CPU can do by themselves."""
    import torch

    from train.functional.rng import noise

    device, bf16 = torch.device(place.device), torch.bfloat16
    on_gpu = device.type == "cuda"
    side = 256 if place.quick else 8192

    def seconds(work: Callable[[], Any], times: int) -> float:
        work()
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    one, other = (torch.randn(side, side, device=device, dtype=bf16) for _ in range(2))
    host = torch.empty(side * side, dtype=bf16, pin_memory=on_gpu)
    there = torch.empty(side * side, dtype=bf16, device=device)
    shape = place.bucket().latent_shape(16, (4, 8, 8))
    found = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "matmul_side": side,
        "matmul_flops": 2 * side**3 / seconds(lambda: one @ other, 20),
        "to_device_bytes": host.nbytes / seconds(lambda: there.copy_(host, non_blocking=True), 20),
        "noise_seconds": seconds(lambda: noise(shape, 1, "bench", 0, (0,)), 3),
    }
    result.write_text(json.dumps(found))


def make(place: Place, configuration: Configuration, result: Path) -> None:
    """The model's folder and a cache for it."""
    from random_cache import write_cache
    from random_model import write_model

    size = configuration.size
    write_model(place.published(size), SIZES[size].component, place.model)
    write_cache(place.cache, place.model, place.bucket(), 8, shard_mb=256)


def bench(place: Place, configuration: Configuration, result: Path) -> None:
    """`wantrain bench` with these options."""
    from train.cli.app import app

    app(["bench", *place.options(configuration), "--json", str(result)], standalone_mode=False)


def in_loop(place: Place, configuration: Configuration, result: Path) -> None:
    """The same updates as a script without a cache does them."""
    import torch
    from in_loop import measure
    from random_cache import write_cache
    from random_model import add_encoders

    add_encoders(place.model, quick=place.quick)
    shutil.rmtree(place.cache)  # whose fingerprint knew no encoders
    bucket = place.bucket()
    write_cache(place.cache, place.model, bucket, 8, shard_mb=256)
    place.clips.mkdir()
    if place.clip is None:
        make_clip(place.clips / "clip.mp4", bucket)
    else:
        shutil.copy(place.clip, place.clips / "clip.mp4")
    (place.clips / "clip.txt").write_text("a texture, which moves to the right")
    measure(place.options(configuration), place.clips, result, vae_dtype=torch.bfloat16)


def make_clip(path: Path, bucket: Any) -> None:
    """A texture that moves."""
    import numpy as np

    from shared.io.mp4 import write_mp4

    random = np.random.default_rng(1)
    texture = random.integers(0, 256, (bucket.height, bucket.width, 3), dtype=np.uint8)
    frames = np.stack([np.roll(texture, 4 * step, axis=1) for step in range(bucket.frames)])
    write_mp4(path, frames, fps=16)


STEPS: dict[str, Callable[[Place, Configuration, Path], None]] = {
    "machine": machine,
    "make": make,
    "bench": bench,
    "in-loop": in_loop,
}


def in_loop_weights(place: Place) -> dict[str, int]:
    """Bytes in bf16 of what VideoX-Fun's script holds for A14B, without LoRAs and activations."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from random_model import on_meta, umt5_config
    from transformers import UMT5EncoderModel

    model = place.published("a14b")
    parts = {
        "three transformers": on_meta(WanTransformer3DModel, model.transformer_config()),
        "UMT5-XXL": on_meta(UMT5EncoderModel, umt5_config(quick=place.quick)),
        "VAE": on_meta(AutoencoderKLWan, dict(model.vae)),
    }
    size = {name: 2 * sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**size, "three transformers": 3 * size["three transformers"]}


class Session:
    """Runs steps in processes of their own until the time is up."""

    def __init__(self, place: Place, minutes: float) -> None:
        self._place = place
        self._end = time.monotonic() + 60 * minutes
        self._made: str | None = None
        self.found: dict[str, Any] = {}
        """Configuration → what was found, or {"left out": why}."""

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def run(self, name: str, configuration: Configuration) -> None:
        """Measure, unless it would take too long."""
        made = configuration.size == self._made
        needed = configuration.seconds + (0 if made else SIZES[configuration.size].make_seconds)
        if self._place.quick:
            needed = 0
        if self.left() < needed:
            self._leave_out(name, f"{needed} s needed, {max(0, self.left()):.0f} s left")
            return
        if not made:
            for folder in (self._place.model, self._place.cache, self._place.clips):
                shutil.rmtree(folder, ignore_errors=True)
            if (why := self._no_room(configuration)) or (why := self.step("make", name)):
                self._leave_out(name, why)
                return
            self._made = configuration.size
        if why := self.step(configuration.step, name):
            self._leave_out(name, why)

    def look_at_machine(self) -> None:
        """Before the first configuration."""
        if why := self.step("machine", "machine"):
            self._leave_out("machine", why)

    def step(self, step: str, name: str) -> str | None:
        """Run one of a configuration; why it failed, if it did."""
        print(f"{name}: {step} ...", file=sys.stderr, flush=True)
        result = self._place.folder / "result.json"
        result.unlink(missing_ok=True)
        began = time.monotonic()
        command = [
            sys.executable, __file__, "--step", step, "--configuration", name,
            "--folder", self._place.folder, "--device", self._place.device,
        ]  # fmt: skip
        if self._place.quick:
            command.append("--quick")
        if self._place.clip is not None:
            command += ["--clip", self._place.clip]
        environment = os.environ | {
            "PYTHONPATH": _python_path(),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self._place.folder),  # where `wantrain bench` leaves a checkpoint of 6 GB
        }
        try:
            ran = subprocess.run(
                list(map(str, command)), env=environment, capture_output=True, text=True,
                timeout=max(1.0, self.left()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{step}: stopped after {time.monotonic() - began:.0f} s, when the time was up"
        if ran.returncode:
            print(ran.stdout + ran.stderr, file=sys.stderr, flush=True)
            lines = (ran.stderr or ran.stdout).strip().splitlines() or [""]
            return f"{step}: exit code {ran.returncode}: {lines[-1][:200]}"
        if result.exists():
            took = time.monotonic() - began
            self.found[name] = {**json.loads(result.read_text()), "process_seconds": took}
        return None

    def _no_room(self, configuration: Configuration) -> str | None:
        if self._place.quick:
            return None
        needed = LEAST_FREE + (30 if configuration.size == "a14b" else 15) * 10**9
        free = shutil.disk_usage(self._place.folder).free
        if free >= needed:
            return None
        return f"{needed / 1e9:.0f} GB needed in {self._place.folder}, {free / 1e9:.0f} free"

    def _leave_out(self, name: str, why: str) -> None:
        print(f"{name}: left out: {why}", file=sys.stderr, flush=True)
        self.found[name] = {"left out": why}


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def table(found: Mapping[str, Any]) -> str:
    """For people, in Markdown."""
    rows = [
        "| configuration | peak GiB: tensors (reserved) | critic, generator update | in passes "
        "| TFLOP/s in passes | MFU | start |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, numbers in found.items():
        if "left out" in numbers:
            rows.append(f"| {name} | left out: {numbers['left out']} | | | | | |")
        elif "encode" in numbers:  # in-loop
            seconds = ", ".join(f"{numbers['by_role'][role]:.2f} s" for role in ROLES)
            encoding = f"of it encoding {numbers['encode']:.2f} s"
            rows.append(f"| {name} | {numbers['peak'] / GIB:.1f} | {seconds}; {encoding} | | | | |")
        elif "loop" in numbers:
            rows.append(_row(name, numbers))
    return "\n".join(rows)


ROLES = ("critic", "generator")


def _row(name: str, report: Mapping[str, Any]) -> str:
    loop, work = report["loop"], report["work"]
    reserved = f" ({report['reserved'] / GIB:.1f})" if report["reserved"] else ""
    seconds = ", ".join(f"{loop['by_role'][role]:.2f} s" for role in ROLES)
    mfu = report["ratios"]["utilisation"]
    return (
        f"| {name} | {report['peak'] / GIB:.1f}{reserved} | {seconds} "
        f"| {1 / report['ratios']['over_passes']:.1%} | {work['in_passes'] / 1e12:.3g} "
        f"| {'' if mfu is None else f'{mfu:.1%}'} | {loop['to_first_step']:.0f} s |"
    )


def report(found: Mapping[str, Any]) -> str:
    """All that was found."""
    lines = []
    if "matmul_flops" in (own := found.get("machine", {})):
        lines.append(
            f"{own['device']}, torch {own['torch']}; a {own['matmul_side']}³ product in bf16 "
            f"{own['matmul_flops'] / 1e12:.3g} TFLOP/s; pinned memory to the card "
            f"{own['to_device_bytes'] / 1e9:.1f} GB/s; noise of one sample "
            f"{own['noise_seconds'] * 1000:.0f} ms of one CPU thread"
        )
    weights = found["a14b-in-loop"]["weights"]
    total = sum(weights.values())
    parts = ", ".join(f"{name} {each / GIB:.1f}" for name, each in weights.items())
    lines.append(f"in-loop at A14B: weights alone {total / GIB:.1f} GiB ({parts})")
    return "\n\n".join([*lines, table(found)])


def main() -> None:
    known = configurations()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that all of it runs")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all of it")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--device", default=None, help="cuda where there is one")
    parser.add_argument(
        "--clip", type=Path, metavar="FILE",
        help="a video of 81 frames or more for in-loop training; without one it is made, by ffmpeg",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument("--folder", type=Path, help="for 45 GB; temporary (removed at the end)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        place = Place(folder=args.folder, device=args.device, quick=args.quick, clip=args.clip)
        configuration = known.get(args.configuration, known["1.3b"])
        STEPS[args.step](place, configuration, args.folder / "result.json")
        return
    from shared.device import default_device

    device = args.device or default_device()
    if device == "cpu" and not args.quick:
        parser.error("there is no GPU here; --quick runs all of it at a tiny size")
    chosen = [name for name in known if name in (args.only or BY_DEFAULT)]

    def keep(found: Mapping[str, Any]) -> None:  # after each, lest a time-out outside lose all
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")

    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.folder) as folder:
        clip = args.clip and args.clip.resolve()
        place = Place(folder=Path(folder), device=device, quick=args.quick, clip=clip)
        session = Session(place, args.minutes)
        session.look_at_machine()
        for name in chosen:
            session.run(name, known[name])
            keep(session.found)
        session.found["a14b-in-loop"] = {"weights": in_loop_weights(place)}
    keep(session.found)
    print(report(session.found))
    if any("left out" in session.found[name] for name in chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
