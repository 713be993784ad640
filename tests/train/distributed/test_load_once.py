"""One process reads the base, and the others get their parts of it: memory, values, failures."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.models.spec import read_model_spec
from tests.models import tiny_model
from tests.train.conftest import encode
from tests.train.strategies.test_strategies import IN_TWO, _environment, command
from train.model.base import load_base

# Before training begins: growth of memory from the load of the base until it is cut, and the
# digest of each weight and table that this process can have, put together from all parts.
WATCH = """
import hashlib, json, os, sys, threading
from pathlib import Path
import psutil, torch
import train.strategies.fsdp, train.session, train.strategies.zero
from train.cli.app import app

deepspeed = train.strategies.zero._deepspeed()  # imports are no part of what is measured
here, me = Path(sys.argv[1]), psutil.Process()
load, spread, initialize = train.session.load_base, train.session.spread, deepspeed.initialize
cut, peaks = threading.Event(), []

def watch(before):
    while not cut.wait(0.005):
        peaks.append(me.memory_info().rss - before)

def watched_load(*args, **kwargs):
    global watcher
    watcher = threading.Thread(target=watch, args=(me.memory_info().rss,))
    watcher.start()
    return load(*args, **kwargs)

def watched_initialize(*args, **kwargs):
    cut.set()  # from here on, DeepSpeed's own buffers
    return initialize(*args, **kwargs)

def whole(tensor):
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().clone()

def watched_spread(name, roles, *args, **kwargs):
    strategy = spread(name, roles, *args, **kwargs)
    cut.set()
    watcher.join()
    digests = {}
    for named in (roles.transformer.named_parameters(), roles.transformer.named_buffers()):
        for name, tensor in named:
            if ".lora_" not in name:
                value = whole(tensor).detach().cpu().contiguous()
                content = hashlib.sha256(value.view(torch.uint8).numpy()).hexdigest()
                digests[name.replace(".base_layer", "")] = [str(value.dtype), content]
    (here / os.environ["RANK"]).write_text(json.dumps({"grown": max(peaks), "digests": digests}))
    return strategy

train.session.load_base, train.session.spread = watched_load, watched_spread
deepspeed.initialize = watched_initialize
app(sys.argv[2:])
"""

# Memory of each matrix is the kernel's again when it is freed, as it is for a 14B's. Those of a few
# MB glibc would keep, among parts that stay.
AS_LARGE = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


def _digest(tensor: torch.Tensor) -> list[str]:
    content = tensor.detach().contiguous().view(torch.uint8).numpy()
    return [str(tensor.dtype), hashlib.sha256(content).hexdigest()]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """121 MB of bf16 in 14 blocks, stored in fp32 as Wan's are."""
    return tiny_model(
        tmp_path_factory.mktemp("wide") / "model", "t2v", two_experts=False,
        num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=14,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide_shards(dataset: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(dataset, wide, tmp_path_factory.mktemp("wide") / "shards")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_one_process_reads_the_base_and_all_have_it(
    wide: Path, wide_shards: Path, tmp_path: Path, strategy: str
) -> None:
    base = load_base(
        read_model_spec(wide), "full", precision="bf16", device=torch.device("cpu"),
        gradient_checkpointing=False,
    )  # fmt: skip
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    expected = {n: _digest(t) for n, t in (*base.named_parameters(), *base.named_buffers())}
    (tmp_path / "watch.py").write_text(WATCH)
    words = (
        "lora", "--model", str(wide), "--shards", str(wide_shards), "--device", "cpu",
        "--output-dir", str(tmp_path / "out"), "--rank", "4", "--max-train-steps", "1",
        "--strategy", strategy, "--num-processes", "2", "--dataloader-num-workers", "0",
    )  # fmt: skip
    subprocess.run(
        [sys.executable, str(tmp_path / "watch.py"), str(tmp_path), *words],
        env=_environment() | AS_LARGE, check=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "out" / "checkpoint-1").exists()
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    shares = [round(process["grown"] / size, 2) for process in (first, second)]
    print(f"{strategy}: {size / 1e6:.0f} MB; grown by {shares} of it")
    assert first["grown"] > 0.9 * size, "what is measured is there"
    assert second["grown"] < 0.9 * size, "its half, a block on the way, what libraries take"
    assert first["digests"] == second["digests"] == expected


@pytest.mark.long
def test_what_the_first_process_cannot_read_ends_all(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """A file that ends early."""
    model = tmp_path / "model"
    shutil.copytree(tiny_t2v, model)
    weights = model / "transformer_2" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    words = command(model, t2v_shards, tmp_path / "out", *IN_TWO, "--strategy", "fsdp")
    ran = subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert re.fullmatch(r"error: model: cannot read \S+/transformer_2/\S+ .*", _errors(ran.stderr))


def _errors(said: str) -> str:
    """All from the first error on."""
    return said[said.index("error: ") :].strip()
