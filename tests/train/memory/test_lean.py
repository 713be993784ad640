"""The process holds one base: measured from outside, on a base large enough to dwarf the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny_model
from tests.train.conftest import encode

WATCH = """
import json, os, sys, threading, time
import psutil, torch
from train.cli.app import app
import train.tracking.progress, train.session

me = psutil.Process()
report, peak = {}, 0
load = train.session.load_base
step = train.tracking.progress.TrainProgress.step

def measured_load(*args, **kwargs):
    report["before"] = me.memory_info().rss

    def watch():
        global peak
        while True:
            peak = max(peak, me.memory_info().rss)
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    return load(*args, **kwargs)

def measured_step(*args, **figures):
    report["peak"] = peak  # that of the last step remains
    return step(*args, **figures)

train.session.load_base = measured_load
train.tracking.progress.TrainProgress.step = measured_step
app(sys.argv[2:], standalone_mode=False)
with open(sys.argv[1], "w") as file:
    json.dump(report, file)
"""


@pytest.mark.long
def test_memory_grows_by_one_base_and_its_loras(dataset: Path, tmp_path: Path) -> None:
    """≥ 500 MB of bf16 base; from load to step 3 the peak is ≤ 1.3 × what must be resident."""
    model = tiny_model(
        tmp_path / "wide", "t2v", two_experts=False, dtype=torch.bfloat16,
        num_attention_heads=16, attention_head_dim=96, ffn_dim=6144, num_layers=7,
    )  # fmt: skip
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    base = weights.stat().st_size
    assert base >= 500e6
    shards = encode(dataset, model, tmp_path / "shards")
    command = [
        "distill", "--model", str(model), "--shards", str(shards), "--device", "cpu",
        "--output-dir", str(tmp_path / "out"), "--max-train-steps", "1", "--rank", "16",
        "--gen-update-interval", "2", "--dataloader-num-workers", "0",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path / "report.json"), *command],
        check=True,
        env=os.environ,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    states = sum(
        tensor.numel() * tensor.element_size()
        for file in (tmp_path / "out" / "checkpoint-1").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    needed = base + states  # both LoRAs in fp32 and both optimizers' moments
    grown = report["peak"] - report["before"]
    print(f"base {base / 1e6:.0f} MB, needed {needed / 1e6:.0f} MB, grown {grown / 1e6:.0f} MB")
    assert grown <= 1.3 * needed
