"""A14B and 1.3B at true sizes: updates as `wantrain bench` measures them, and a block profiled."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from random_cache import write_cache
from random_model import add_encoders, random_weights

from gpu.place import Place
from shared.format.buckets import Bucket
from shared.models.wan import PUBLISHED, PublishedModel, write_configs
from train.tracking.step_log import peak_memory

A14B, SMALL = "wan2.2-i2v-a14b", "wan2.1-t2v-1.3b"
_TOP = 15
"""Kernels of a profile that are kept."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A measurement of updates; the low-noise expert of A14B, unless told otherwise."""

    options: tuple[str, ...] = ()
    """Of `wantrain distill`."""
    published: str = A14B

    @property
    def on_cpu(self) -> bool:
        """Whether the base is made on the CPU, as a run that does not want it whole loads it."""
        return "--low-vram" in self.options or "--base-precision" in self.options


def bucket(place: Place) -> Bucket:
    """Of all clips."""
    return Bucket(32, 64, 9) if place.quick else Bucket(480, 832, 81)


def published(place: Place, name: str) -> PublishedModel:
    """The model, perhaps less deep; quick: two narrow layers of it, and a small VAE."""
    model = PUBLISHED[name]
    if place.quick:
        vae = {**model.vae, "base_dim": 8, "num_res_blocks": 1}
        model = replace(model, heads=1, ffn_dim=64, layers=2, vae=vae)
    return replace(model, layers=min(model.layers, place.layers or model.layers))


def make(place: Place, training: Training) -> list[str]:
    """Configs of the model and a cache for it, in new folders; options of `wantrain distill`."""
    folder = place.folder / "large"
    shutil.rmtree(folder, ignore_errors=True)
    write_configs(published(place, training.published), folder / "model")
    write_cache(folder / "cache", folder / "model", bucket(place), 8, shard_mb=256)
    return [
        "--model", str(folder / "model"), "--shards", str(folder / "cache"),
        "--device", place.device, "--rank", "8" if place.quick else "64",
        "--gen-update-interval", "1", *training.options,
    ]  # fmt: skip


def bench(place: Place, training: Training) -> None:
    """`wantrain bench`: a critic and a generator update, after one of each that warm up."""
    from train.cli.app import app

    options = make(place, training)
    report = place.folder / "report.json"
    made_on = torch.device("cpu" if training.on_cpu else place.device)
    with random_weights(made_on) as seconds, _pinning(place, seconds), _kept_early(place):
        app(["bench", *options, "--json", str(report)], standalone_mode=False)
    layers = published(place, training.published).layers
    found = {**json.loads(report.read_text()), "layers": layers, "seconds": seconds}
    if place.on_gpu:
        free, total = torch.cuda.mem_get_info()
        found["beside_torch"] = total - free - torch.cuda.memory_reserved()
    place.keep(found)


@contextmanager
def _kept_early(place: Place) -> Iterator[None]:
    """Keeps what was measured before FLOPs are counted, which takes the CPU many seconds."""
    from train.bench import bench

    def loop(watcher: Any, waits: Any) -> Any:
        found = measured(watcher, waits)
        peak = peak_memory(torch.device(place.device))
        place.keep({"measured": asdict(found), "peak": peak})
        return found

    measured = bench._Watcher.loop
    with patch.object(bench._Watcher, "loop", loop):
        yield


@contextmanager
def _pinning(place: Place, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of moving blocks to pinned memory, if any."""
    from train.strategies import spread

    def timed(*given: Any) -> Any:
        began = time.perf_counter()
        streamed = stream_blocks(*given)
        place.wait()
        seconds["pinning"] = time.perf_counter() - began
        return streamed

    stream_blocks = spread.stream_blocks
    with patch.object(spread, "stream_blocks", timed):
        yield


def profile_block(place: Place, training: Training) -> None:
    """Where the GPU's time goes in one block: kernels of an update of each role."""
    from rich.console import Console

    from shared.cli.config_command import configuration
    from train.cli.app import app
    from train.loop import micro_batches
    from train.prepare import prepare_distillation
    from train.session import open_session

    place = replace(place, layers=1)
    options = make(place, training)
    output = place.folder / "profile"
    arguments = ["distill", *options, "--output-dir", str(output), "--max-train-steps", "1"]
    run = prepare_distillation(configuration(app, arguments))
    device = torch.device(run.device)
    with random_weights(device):
        session = open_session(run, Console(stderr=True).print)
    batches, negative = micro_batches(run, session.bank), session.bank.negative.to(device)
    found: dict[str, Any] = {}
    for update in range(run.cycle):
        role = run.objective.role_of(update)
        batch = batches.load(update, 0).to(device)

        def work(role: str = role, batch: Any = batch) -> None:
            step = run.objective.loss(session.roles, role, batch, negative)
            with session.roles.role(role):
                step.loss.backward()
            place.wait()

        work()
        with torch.profiler.profile() as profile:
            work()
        found[role] = _kernels(profile, on_gpu=place.on_gpu)
        place.keep(found)


def _kernels(profile: Any, *, on_gpu: bool) -> dict[str, Any]:
    """Seconds of the most expensive kernels (on a CPU: operators) and of all."""
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in profile.key_averages()
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    }
    top = sorted(spent, key=lambda name: -spent[name])[:_TOP]
    return {"seconds": sum(spent.values()), "kernels": {name[:120]: spent[name] for name in top}}


def in_loop(place: Place, training: Training) -> None:
    """The same updates as a script without a cache does them."""
    from in_loop import measure

    options = make(place, training)
    folder = place.folder / "large"
    add_encoders(folder / "model", quick=place.quick)
    shutil.rmtree(folder / "cache")  # whose fingerprint knew no encoders
    write_cache(folder / "cache", folder / "model", bucket(place), 8, shard_mb=256)
    clips = folder / "clips"
    clips.mkdir()
    if place.clip is None:
        make_clip(clips / "clip.mp4", bucket(place))
    else:
        shutil.copy(place.clip, clips / "clip.mp4")
    (clips / "clip.txt").write_text("a texture, which moves to the right")
    report = place.folder / "report.json"
    with random_weights(torch.device(place.device)):
        measure(options, clips, report, vae_dtype=torch.bfloat16)
    place.keep(json.loads(report.read_text()))


def make_clip(path: Path, bucket: Bucket) -> None:
    """A texture that moves."""
    import numpy as np

    from shared.io.mp4 import write_mp4

    random = np.random.default_rng(1)
    texture = random.integers(0, 256, (bucket.height, bucket.width, 3), dtype=np.uint8)
    frames = np.stack([np.roll(texture, 4 * step, axis=1) for step in range(bucket.frames)])
    write_mp4(path, frames, fps=16)
