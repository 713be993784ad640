"""Is training lean, and what does the cache buy? Ratios, measured in one run.

    python benchmarks/train_lean.py           # 5 minutes on 2 cores
    python benchmarks/train_lean.py --quick   # that all of it runs; its numbers mean nothing

Makes clips, a Wan i2v model with random weights (the real classes; a transformer large enough that
its passes are what takes time), and shards by `wanprep encode`. Then, each in a process of its own:

- the lean loop: `wantrain bench` on these shards, and what it holds (`lean_run.py held`);
- the same updates in-loop, as scripts without a cache do them: every step decodes a clip, encodes
  it, its condition and its caption, and teacher, generator and critic are a model each. The maths
  of the steps is the same code;
- the loader on samples of real size (832 × 480 × 81) beside a sequential read of the same shards
  (`lean_run.py loader`);
- from the start of the process to the end of the first step, with a million samples and with 256.

Times of passes are taken inside the run that they are compared with, and the loader takes turns
with the plain read, so that other work on the machine strikes both sides of a ratio.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

LEAN_GOAL = 1.02
FRAMES = 17
SHARD_SAMPLES = 256
LOOP_OPTIONS = [
    "--rank", "8", "--network-alpha", "4", "--gen-update-interval", "2", "--device", "cpu",
    "--dataloader-num-workers", "1", "--boundary-type", "full", "--caption-dropout", "0",
]  # fmt: skip
"""Rank 8 of width 512 is to this transformer what rank 64 is to a 14B one: 2% of its weights."""


def make(work: Path, quick: bool) -> None:
    """Model, clips with captions, shards."""
    import numpy as np
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    from preprocess.cli.app import app
    from shared.io.mp4 import write_mp4
    from tests.models import TEXT_DIM, tiny_model

    heads, layers = (2, 2) if quick else (8, 8)
    side = 32 if quick else 128
    model = tiny_model(
        work / "model", "i2v", two_experts=False, num_attention_heads=heads,
        attention_head_dim=64, ffn_dim=256 * heads, num_layers=layers, dtype=torch.bfloat16,
    )  # fmt: skip
    if not quick:
        encoder = model / "text_encoder"
        vocabulary = UMT5Config.from_pretrained(encoder).vocab_size
        text = UMT5Config(
            vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=64, d_ff=1024, num_layers=24,
            num_heads=8, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        UMT5EncoderModel(text).bfloat16().save_pretrained(encoder)
    random = np.random.default_rng(1)
    clips = work / "clips"
    clips.mkdir()
    for number in range(4):
        texture = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        frames = np.stack([np.roll(texture, 4 * shift, axis=1) for shift in range(FRAMES)])
        write_mp4(clips / f"{number}.mp4", frames, fps=16)
        (clips / f"{number}.txt").write_text(f"texture number {number}, which moves to the right")
    app(
        [
            "encode", "--model", str(model), "--train-data-dir", str(clips), "--output",
            str(work / "shards"), "--size", str(side), "--video-sample-n-frames", str(FRAMES),
            "--video-sample-stride", "1", "--device", "cpu", "--num-workers", "1",
        ],
        standalone_mode=False,
    )  # fmt: skip


def lean(work: Path, quick: bool) -> None:
    """The loop as it is."""
    wantrain_bench(work, work / "model", work / "shards", *LOOP_OPTIONS, name="lean")


def wantrain_bench(work: Path, model: Path, shards: Path, *more: str, name: str) -> None:
    from train.cli.app import app

    app(
        [
            "bench", "--model", str(model), "--shards", str(shards),
            "--json", str(work / f"{name}.json"), *more,
        ],
        standalone_mode=False,
    )  # fmt: skip


def held(work: Path, quick: bool) -> None:
    """All tensors of the same loop."""
    from lean_run import measure

    options = ["--model", str(work / "model"), "--shards", str(work / "shards"), *LOOP_OPTIONS]
    measure("held", options, work / "held.json")


def in_loop(work: Path, quick: bool) -> None:
    """One cycle as scripts without a cache train it, after one update that warms up."""
    from in_loop import measure

    options = ["--model", str(work / "model"), "--shards", str(work / "shards"), *LOOP_OPTIONS]
    measure(options, work / "clips", work / "in-loop.json")


def loader(work: Path, quick: bool) -> None:
    """Samples as of 832 × 480 × 81: 4.2 MB of latents, 4.2 MB of condition, 60 to 300 tokens."""
    from lean_run import measure
    from random_cache import write_cache

    from shared.format.buckets import Bucket
    from tests.models import tiny_model

    model = text_wide(tiny_model(work / "wide", "i2v", two_experts=False), 4096)
    bucket = Bucket(96, 160, 5) if quick else Bucket(480, 832, 81)
    write_cache(work / "large", model, bucket, 8 if quick else 64, shard_mb=256)
    options = ["--model", str(model), "--shards", str(work / "large"), "--device", "cpu"]
    measure("loader", options, work / "loader.json")


def start(work: Path, quick: bool) -> None:
    """A million rows that share the bytes of 256 real samples."""
    from random_cache import write_cache

    from shared.format.buckets import Bucket
    from tests.models import tiny_model

    model = tiny_model(work / "small", "i2v", two_experts=False)
    write_cache(work / "few", model, Bucket(32, 48, 5), SHARD_SAMPLES, shard_mb=64)
    repeat_shard(work / "few", work / "million", 4 if quick else 3907)


def first_step(work: Path, quick: bool, name: str) -> None:
    wantrain_bench(
        work, work / "small", work / name, *LOOP_OPTIONS, "--gen-update-interval", "1", name=name
    )


def text_wide(model: Path, width: int) -> Path:
    """Its transformer for text of this width, with random weights."""
    from diffusers import WanTransformer3DModel

    folder = model / "transformer"
    config = json.loads((folder / "config.json").read_text()) | {"text_dim": width}
    WanTransformer3DModel.from_config(config).save_pretrained(folder)
    return model


def repeat_shard(one: Path, many: Path, times: int) -> None:
    """The index and sidecars of a cache of `times` as many samples; its tars are links to one."""
    import numpy as np

    from shared.cache.index import entries_of, write_index
    from shared.format.cache import Sidecar, open_cache
    from shared.io.store import Store

    many.mkdir()
    index = open_cache(Store(one))
    (name,) = index.shards
    for prompts in index.prompt_shards:
        for file in (prompts, Sidecar.path_for(Path(prompts)).name):
            shutil.copy(one / file, many / file)
    sidecar = Sidecar.read(Sidecar.path_for(one / name))
    stem = name.rpartition("-")[0]
    for number in range(1, times + 1):
        tar = many / f"{stem}-{number:05d}.tar"
        os.link(one / name, tar)
        own = replace(sidecar, shard=tar.name, sha256=f"{number:064x}")
        Sidecar.path_for(tar).write_text(json.dumps(own.to_json()))
    columns = {
        column: np.concatenate([values] * times) for column, values in index.read_columns().items()
    }
    rows = len(columns["key"])
    columns["key"] = np.random.default_rng(1).integers(0, 256, (rows, 16), np.uint8)
    columns["shard"] = np.repeat(np.arange(times, dtype=np.int32), len(index))
    entries = entries_of(many)
    write_index(Store(many), entries, ({entry.shard for entry in entries.samples}, columns))


STEPS: dict[str, Callable[[Path, bool], None]] = {
    "make": make,
    "lean": lean,
    "held": held,
    "in-loop": in_loop,
    "loader": loader,
    "start": start,
    "few": lambda work, quick: first_step(work, quick, "few"),
    "million": lambda work, quick: first_step(work, quick, "million"),
}


def report(work: Path) -> None:
    """The ratios."""
    found = {
        name: json.loads((work / f"{name}.json").read_text())
        for name in ("lean", "held", "in-loop", "loader", "few", "million")
    }
    lean, resident, in_loop = found["lean"], found["held"], found["in-loop"]
    loop, gib = lean["loop"], 2**30
    held = resident["base"] + resident["loras"]
    print(f"{'load of the machine':<58}{os.getloadavg()[0]:8.1f}")
    for name, seconds in loop["parts"].items():
        print(f"{'lean loop, ' + name:<58}{seconds / loop['seconds']:8.2%}")
    wait = loop["data_wait"] / loop["seconds"]
    print(f"{'lean loop, … of it waiting for data':<58}{wait:8.2%}")
    for role, seconds in loop["by_role"].items():
        theirs = in_loop["by_role"][role]
        print(f"{'in-loop / lean, time of a ' + role + ' update':<58}{theirs / seconds:8.2f}")
    print(f"{'in-loop, encoding in an update':<58}{in_loop['encode']:8.2f} s")
    print(f"{'in-loop / lean, resident weights':<58}{in_loop['weights'] / held:8.2f}")
    print(f"{'in-loop / lean, peak memory':<58}{in_loop['peak'] / lean['peak']:8.2f}")
    print(f"{'plain read':<58}{found['loader']['raw'] / gib:8.2f} GiB/s")
    first = {name: found[name]["loop"]["to_first_step"] for name in ("few", "million")}
    print(f"{'start to first step, 256 samples':<58}{first['few']:8.2f} s")
    print(f"{'start to first step, all samples':<58}{first['million']:8.2f} s")
    from lean_run import LOADER_GOAL, RESIDENT_GOAL

    goals = (
        ("step time / transformer passes alone", lean["ratios"]["over_passes"], "≤", LEAN_GOAL),
        ("resident / one base, LoRAs, optimizers", resident["over_needed"], "≤", RESIDENT_GOAL),
        ("loader / sequential read", found["loader"]["ratio"], "≥", LOADER_GOAL),
    )
    print()
    for name, ratio, sign, goal in goals:
        reached = "reached" if (ratio <= goal if sign == "≤" else ratio >= goal) else "missed"
        print(f"{name:<58}{ratio:8.3f} (goal {sign} {goal}: {reached})")
    print(f"{'start at a million samples / at 256':<58}{first['million'] / first['few']:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that all of it runs")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        STEPS[args.step](args.folder, args.quick)
        return
    own = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="lean-") as folder:
        for step in STEPS:
            print(f"{step} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--step", step, "--folder", folder]
            ran = subprocess.run(
                command + ["--quick"] * args.quick, env=own, capture_output=True, text=True
            )
            if ran.returncode:
                print(ran.stdout + ran.stderr)
                sys.exit(ran.returncode)
        report(Path(folder))


if __name__ == "__main__":
    main()
