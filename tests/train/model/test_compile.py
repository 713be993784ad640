"""--compile: the numbers of eager code, each graph compiled once, never left to eager code."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from benchmarks import lean_run
from shared.errors import UserError
from tests.models import tiny_model
from tests.train.memory.test_block_offload import LateStream
from tests.train.methods.test_finetune import SMALL as FINETUNE
from tests.train.methods.test_finetune import finetune, loss_curve
from tests.train.model.test_roles import build_roles
from tests.train.strategies.test_strategies import apart, lora_of, typed
from tests.train.test_distill import SMALL, WANTRAIN, distill, losses
from train.memory import activation_offload, block_offload
from train.model.compile import RECOMPILE_LIMIT, compile_blocks

RUN = (
    "--mixed-precision", "no", "--where", "type=video", "--where", "height<=48",
    "--save-precision", "fp32",
)  # fmt: skip
SITE = """
import atexit, sys, torch
from torch._dynamo.utils import counters
torch.compiler.set_default_backend("aot_eager")

@atexit.register
def tell():
    frames, graphs = counters["frames"], counters["stats"]["unique_graphs"]
    left, breaks = frames["total"] - frames["ok"], dict(counters["graph_break"])
    print(f"{graphs} graphs, {left} frames left to eager code, breaks {breaks}", file=sys.stderr)
"""
"""What every Python of a run imports first."""
GRAPHS = 7
"""Teacher; generator and critic without gradient; either with it, for the first block, whose input
has no gradient, and for the others."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole graphs, forward and backward, run by torch's own kernels: seconds and not minutes."""
    torch._dynamo.reset()
    counters.clear()
    torch.compiler.set_default_backend("aot_eager")
    yield
    torch.compiler.set_default_backend(None)
    torch._dynamo.reset()


def assert_alike(eager: Path, compiled: Path) -> None:
    """Losses and LoRA files."""
    expected, found = losses(eager), losses(compiled)
    for role, curve in expected.items():
        assert [x for _, x in found[role]] == pytest.approx([x for _, x in curve], rel=1e-5)
    for name in ("lora-low-diffusers", "lora-low-comfyui"):
        one, other = (load_file(o / f"{name}.safetensors") for o in (eager, compiled))
        assert one.keys() == other.keys()
        for key, weight in one.items():
            assert torch.allclose(weight, other[key], rtol=1e-3, atol=1e-5), key


@pytest.mark.long
def test_a_compiled_run_has_the_numbers_of_an_eager_one(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, traced: None
) -> None:
    """Both roles, checkpointed; it goes on from an eager one's checkpoint."""
    eager, out = tmp_path / "eager", tmp_path / "compiled"
    few = (
        *RUN,
        "--gen-update-interval",
        "1",
        "--max-train-steps",
        "3",
        "--checkpointing-steps",
        "1",
    )
    distill(tiny_t2v, t2v_shards, eager, *few)
    assert not counters["frames"]
    shutil.copytree(eager, out)
    middle = str(out / "checkpoint-1")
    distill(tiny_t2v, t2v_shards, out, *few, "--compile", "--resume-from-checkpoint", middle)
    assert counters["stats"]["unique_graphs"] == GRAPHS + 1  # and the line that tries it out
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    assert not counters["graph_break"]
    assert_alike(eager, out)


@pytest.mark.long
def test_no_tensors_are_counted_that_stand_for_others(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, traced: None
) -> None:
    """While it compiles, torch makes tensors without memory, and keeps some."""
    resident, file = [], tmp_path / "found.json"
    few = ["--model", str(tiny_t2v), "--shards", str(t2v_shards), *SMALL, *RUN]
    few += ["--train-batch-size", "1", "--gen-update-interval", "1"]
    for more in ((), ("--compile",)):
        lean_run.measure("held", [*few, *more], file)
        resident.append(json.loads(file.read_text()))
    assert counters["stats"]["unique_graphs"] > 0
    for part in ("base", "loras", "optimizers"):
        assert resident[0][part] == resident[1][part] > 0


@pytest.mark.long
@pytest.mark.parametrize("stored", ["int8", "nf4"])
def test_what_saves_memory_can_be_compiled(
    t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: None, stored: str
) -> None:
    """Few bits for a weight, blocks that stream with copies as late as may be, activations that
    wait in CPU memory: the numbers of the same base in eager code, in whole graphs."""
    model = tiny_model(tmp_path / "deep", "t2v", num_layers=4)
    few = (
        *RUN, "--gen-update-interval", "1", "--max-train-steps", "2", "--base-precision", stored,
    )  # fmt: skip
    eager, out = tmp_path / "eager", tmp_path / "compiled"
    distill(model, t2v_shards, eager, *few)
    monkeypatch.setattr(block_offload, "SideStream", LateStream)
    monkeypatch.setattr(activation_offload, "SideStream", LateStream)
    distill(model, t2v_shards, out, *few, "--compile", "--low-vram", "--activation-offloading")
    assert counters["stats"]["unique_graphs"] == GRAPHS + 1
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    assert not counters["graph_break"]
    assert_alike(eager, out)


@pytest.mark.long
def test_one_graph_serves_all_shapes(tiny_t2v: Path, traced: None) -> None:
    """Of clips and pictures, some with sides that happen to be equal."""
    roles, plain = build_roles(tiny_t2v), build_roles(tiny_t2v)
    compile_blocks(roles.transformer, several_shapes=True)
    assert torch._dynamo.config.recompile_limit >= RECOMPILE_LIMIT
    rng = torch.Generator().manual_seed(4)
    text, timestep = torch.randn(2, 512, 32, generator=rng), torch.tensor([900.0, 300.0])
    for shape in ((3, 6, 10), (3, 10, 8), (4, 8, 8), (1, 6, 8), (2, 4, 4), (5, 4, 10)):
        x_t = torch.randn(2, 16, *shape, generator=rng)
        with torch.no_grad(), roles.teacher(), plain.teacher():
            found = roles.velocity(x_t, timestep, text, None)
            expected = plain.velocity(x_t, timestep, text, None)
        assert torch.allclose(found, expected, atol=1e-5), shape
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["frames"] == {"total": 1, "ok": 1}


@pytest.mark.long
def test_sharded_blocks_are_compiled_whole(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """FSDP2 in two processes: its hooks break no graph; the LoRA of one eager process."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    eager, out = tmp_path / "eager", tmp_path / "compiled"
    finetune(tiny_t2v, t2v_shards, eager, *RUN, "--max-train-steps", "2")
    places = ("--model", tiny_t2v, "--shards", t2v_shards, "--output-dir", out)
    places += ("--boundary-type", "low")
    said = typed(
        WANTRAIN, "lora", *map(str, places), *FINETUNE, *RUN, "--max-train-steps", "2",
        "--compile", "--train-batch-size", "1", "--num-processes", "2", "--strategy", "fsdp",
        PYTHONPATH=f"{site}:{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    # The first block, the others, and the line that tries it out
    assert said.count("3 graphs, 0 frames left to eager code, breaks {}") == 2
    assert apart(lora_of(eager), lora_of(out)) < 1e-5


@pytest.mark.long
def test_compiled_kernels_round_where_eager_code_does(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """In bf16, by a real compiler: the LoRA of eager code to the bit, measured. Left to itself the
    compiler rounds less often, and the LoRA is 2e-3 away after two updates."""
    few = ("--mixed-precision", "bf16", "--max-train-steps", "2", "--where", "height<=48")
    eager, out = tmp_path / "eager", tmp_path / "compiled"
    finetune(tiny_t2v, t2v_shards, eager, *few)
    finetune(tiny_t2v, t2v_shards, out, *few, "--compile")
    assert loss_curve(out) == pytest.approx(loss_curve(eager), rel=1e-6)
    assert apart(lora_of(eager), lora_of(out)) < 2e-4


def test_what_cannot_compile_is_said(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(
        UserError, match=r"^--compile: torch can't compile for cpu here \(.+\. Inst"
    ):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--compile", "--max-train-steps", "1")
    wanted = ("--strategy", "zero3", "--num-processes", "2", "--train-batch-size", "1")
    with pytest.raises(UserError, match=r"^--compile: found with --strategy zero3.*fsdp"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--compile", *wanted)
