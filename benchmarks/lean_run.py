"""What a run holds and how fast it loads, beside the least that it could.

    python benchmarks/lean_run.py held   --model MODEL --shards DIR … [--json FILE]
    python benchmarks/lean_run.py loader --model MODEL --shards DIR … [--json FILE]

Takes the options of `wantrain distill`. `held` trains two cycles in a folder that is thrown away
and counts all tensors of the process before the last update (goal: at most 1.05 times one base,
its buffers, LoRAs and optimizer states). `loader` makes the run's batches in one thread, taking
turns with a sequential read of the same shards, so that other work on the machine strikes both
(goal: at least 0.9 of it).
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from shared.cli.config_command import configuration
from train.bench.bench import briefly
from train.cli.app import app
from train.cli.execute import carry_out
from train.data.batches import load_prompt_bank
from train.loop import micro_batches, train
from train.memory.block_offload import streamed_blocks
from train.prepare import prepare_distillation
from train.run import Run
from train.strategies.spread import held_bytes
from train.tracking.step_log import peak_memory

RESIDENT_GOAL, LOADER_GOAL = 1.05, 0.9
RAW_CHUNK = 1 << 20
"""Bytes of a plain read: into one buffer that stays in the CPU's cache, the fastest there is."""
MOST_LOADED = 1 << 30
"""Bytes that one measurement of the loader reads."""
MOST_UPDATES = 1000
"""Of one measurement, where samples are small."""
ROUNDS = 7


class Resident:
    """Bytes of all tensors that this process holds between two updates, taken once, before the
    last one."""

    def __init__(self, run: Run) -> None:
        self._run, self._updates, self._stepped = run, 0, False
        self._optimizers: dict[int, int] = {}
        self._sizes: dict[str, int] | None = None

    def before_module(self, module: nn.Module, inputs: Any) -> None:
        if not self._run.spec.family.is_of(module):
            return
        self._updates += self._stepped  # DeepSpeed makes an update's step in parts
        self._stepped = False
        if self._sizes is None and self._updates == self._run.updates - 1:
            self._sizes = sizes(module)

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        state = (value for values in optimizer.state.values() for value in values.values())
        held = held_bytes(value for value in state if isinstance(value, torch.Tensor))
        self._optimizers[id(optimizer)], self._stepped = held, True

    def found(self) -> dict[str, Any]:
        """Bytes by part: `base`, weights without LoRAs, this rank's part; `streamed`, those of them
        in CPU memory; `stream_buffers` of the device, which those visit; `loras`; `optimizers`;
        `others`. `over_needed`: all over those that a run needs, all but `others`."""
        assert self._sizes is not None
        optimizers = sum(self._optimizers.values())
        found = self._sizes | {"optimizers": optimizers}
        found["others"] -= optimizers
        needed = sum(found[part] for part in ("base", "stream_buffers", "loras", "optimizers"))
        return {
            **found,
            "peak": peak_memory(torch.device(self._run.device)),
            "over_needed": (needed + found["others"]) / needed,
        }


def sizes(transformer: nn.Module) -> dict[str, int]:
    """Bytes of the transformer's parts, and as others those of all tensors else that the process
    holds."""
    blocks = streamed_blocks(transformer)
    streamed, buffers = (0, 0) if blocks is None else (blocks.home_bytes, blocks.buffer_bytes)
    parameters = [p for p in transformer.parameters() if blocks is None or p not in blocks]
    base = streamed + held_bytes(p for p in parameters if not p.requires_grad)
    loras = held_bytes(p for p in parameters if p.requires_grad)
    places = dict(place for place in map(_place, gc.get_objects()) if place is not None)
    return {
        "base": base,
        "streamed": streamed,
        "stream_buffers": buffers,
        "loras": loras,
        "others": sum(places.values()) - base - buffers - loras,
    }


def _place(thing: Any) -> tuple[int, int] | None:
    """Address and bytes of a tensor's storage; None of what has none in memory: tensors on meta,
    and those that torch.compile keeps to stand for real ones."""
    if not issubclass(type(thing), torch.Tensor):
        return None
    try:
        storage = thing.untyped_storage()
        return None if storage.device.type == "meta" else (storage.data_ptr(), storage.nbytes())
    except RuntimeError:  # torch has no other way to say that functional tensors have no memory
        return None


def held(run: Run, console: Console) -> dict[str, Any]:
    """Train two cycles; what the process holds."""
    with briefly(run, 1) as run:
        resident = Resident(run)
        hooks = (
            register_module_forward_pre_hook(resident.before_module),
            register_optimizer_step_post_hook(resident.after_step),
        )
        try:
            train(run, console, keep=False)
        finally:
            for hook in hooks:
                hook.remove()
        return resident.found()


def loader(run: Run, console: Console) -> dict[str, Any]:
    """Bytes a second of one thread that makes the run's batches (`loaded`), and of a sequential
    read of the same shards (`raw`); `ratio`: the median over rounds of both."""
    run = replace(run, config=replace(run.config, caption_dropout=0.0))
    bank = load_prompt_bank(run.data.first, run.spec.family)
    dataset = replace(micro_batches(run, bank), first_noise=None)  # reading alone

    def load(updates: int) -> int:
        done = 0
        for batch in dataset.ahead(start=0, stop=updates, workers=0):
            tensors = (batch.latents, batch.condition, batch.image, *batch.texts)
            done += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return done

    fitting = MOST_LOADED // max(1, load(1))
    updates = max(1, min(run.plan.batches_per_epoch, MOST_UPDATES, fitting))
    indices = [part.index for part in run.data.parts]
    shards = [(index.store, name) for index in indices for name in index.shards]
    buffer = bytearray(RAW_CHUNK)

    def read() -> int:
        done = 0
        for store, name in shards:
            with store.shard_file(store.folder / name).open("rb", buffering=0) as stream:
                while done < MOST_LOADED and (got := stream.readinto(buffer)):
                    done += got
        return done

    load(updates)
    read()
    rates: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        bytes_read = read()
        between = time.perf_counter()
        bytes_loaded = load(updates)
        raw = bytes_read / (between - began)
        rates.append((raw, bytes_loaded / (time.perf_counter() - between)))
    return {
        "raw": statistics.median(raw for raw, _ in rates),
        "loaded": statistics.median(loaded for _, loaded in rates),
        "ratio": statistics.median(loaded / raw for raw, loaded in rates),
    }


MEASURES = {"held": held, "loader": loader}


def measure(what: str, options: list[str], file: Path | None = None) -> None:
    """Write what was found as JSON, or print it. In all processes of the run."""

    def measured(run: Run, console: Console) -> None:
        text = json.dumps(MEASURES[what](run, console), indent=2)
        if not run.ranks.first:
            return
        if file is None:
            print(text)
        else:
            file.write_text(text + "\n")

    carry_out(prepare_distillation(configuration(app, ["distill", *options])), measured)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here instead")
    args, options = parser.parse_known_args()
    measure(args.what, options, args.json)


if __name__ == "__main__":
    main()
