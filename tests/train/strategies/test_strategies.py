"""One run in two real processes: the numbers of one process, whatever the strategy."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.foreign_names import foreign_names
from tests.train.test_distill import distill, losses

# fp32; a batch of four samples an update, cut in whichever way; gradients that are clipped
RUN = (
    "--mixed-precision", "no", "--boundary-type", "low", "--gen-update-interval", "1",
    "--max-train-steps", "5", "--learning-rate", "1e-3", "--learning-rate-critic", "1e-3",
    "--rank", "4", "--network-alpha", "3", "--max-grad-norm", "0.002", "--save-precision", "fp32",
    "--real-guidance-scale", "3", "--seed", "5", "--device", "cpu",
)  # fmt: skip
SINGLE = ("--train-batch-size", "4")
IN_TWO = ("--train-batch-size", "2", "--num-processes", "2")


def command(model: Path, shards: Path, out: Path, *more: str) -> list[str]:
    wantrain = str(Path(sys.executable).with_name("wantrain"))
    places = ("--model", str(model), "--shards", str(shards), "--output-dir", str(out))
    return [wantrain, "distill", *places, *RUN, *more]


def typed(*words: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a command as a user does; what it said on stderr."""
    ran = subprocess.run(
        words,
        cwd=cwd,
        env=_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def _environment() -> dict[str, str]:
    launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in launchers} | {"OMP_NUM_THREADS": "1"}


def lora_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "lora-low-diffusers.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of all tensors together."""
    assert one.keys() == other.keys()
    squares = sum(float((one[k].double() - other[k].double()).square().sum()) for k in one)
    return float(squares / sum(float(v.double().square().sum()) for v in one.values())) ** 0.5


@pytest.fixture(scope="module")
def alone(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return distill(tiny_t2v, t2v_shards, out, *RUN, *SINGLE)


def assert_like_alone(alone: Path, out: Path) -> None:
    for name in ("loss", "score_sigma"):  # of the samples of all processes
        expected, found = losses(alone, name), losses(out, name)
        assert expected.keys() == found.keys()
        for role, curve in expected.items():
            assert [step for step, _ in curve] == [step for step, _ in found[role]]
            for (_, one), (_, other) in zip(curve, found[role], strict=True):
                assert other == pytest.approx(one, rel=1e-5)
    assert apart(lora_of(alone), lora_of(out)) <= 1e-4
    for form in ("diffusers", "comfyui", "kohya"):
        name = f"lora-low-{form}.safetensors"
        assert load_file(alone / name).keys() == load_file(out / name).keys()
    ours, theirs = (sorted(p.name for p in (o / "checkpoint-5").iterdir()) for o in (alone, out))
    assert ours == theirs
    state = json.loads((out / "checkpoint-5" / "state.json").read_text())
    assert state["updates"] == 10
    for file in ours:
        if file.endswith(".safetensors"):
            one, other = (load_file(o / "checkpoint-5" / file) for o in (alone, out))
            assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
            # Moment by moment: beside the counter of steps the others are next to nothing.
            for kind in {name.rpartition("/")[2] if "/" in name else "" for name in one}:
                both = ({n: t for n, t in o.items() if n.endswith(kind)} for o in (one, other))
                assert apart(*both) <= 1e-3, (file, kind)


@pytest.mark.parametrize(
    "strategy",  # long: of what those that cut the base do, they do a part
    [
        pytest.param("ddp", marks=pytest.mark.long),
        "fsdp",
        pytest.param("zero2", marks=pytest.mark.long),
        "zero3",
    ],
)
def test_two_processes_give_the_numbers_of_one(
    alone: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, strategy: str
) -> None:
    out, compiled = tmp_path / "out", tmp_path / "compiled"
    words = command(tiny_t2v, t2v_shards, out, *IN_TWO, "--strategy", strategy)
    said = typed(*words, TORCH_EXTENSIONS_DIR=str(compiled))
    assert_like_alone(alone, out)
    assert said.count("saved    ") == 1, "one process speaks and writes"
    assert "Warning" not in said
    assert not compiled.exists(), "no minutes of a compiler before a CPU's first run"
    held, whole = map(float, re.findall(r"stores ([\d.]+) of ([\d.]+) MB", said)[0])
    cut = strategy in ("fsdp", "zero3")
    assert held < 0.7 * whole if cut else held == whole


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("fsdp", ("--keep-attention", "--fused-lora")),
        ("fsdp", ("--keep-attention", "--activation-offloading")),
        ("zero2", ("--fused-lora",)),
        ("zero3", ("--keep-attention",)),
    ],
)
def test_what_saves_time_in_two_processes(
    alone: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, strategy: str,
    more: tuple[str, ...],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    typed(*command(tiny_t2v, t2v_shards, out, *IN_TWO, "--strategy", strategy, *more))
    assert_like_alone(alone, out)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_i2v_micro_steps_and_an_average_in_two_processes(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path, strategy: str
) -> None:
    """The same with two micro-steps an update, without checkpointing, gone on from the middle; and
    validation clips of the average on the way."""
    average = (
        "--ema-decay", "0.5", "--ema-start", "1", "--no-gradient-checkpointing",
        "--validation-steps", "2",
    )  # fmt: skip
    micro_steps = (*average, "--gradient-accumulation-steps", "2")
    one, out = tmp_path / "one", tmp_path / "out"
    distill(tiny_i2v, i2v_shards, one, *RUN, *micro_steps, "--train-batch-size", "2")
    two = (*micro_steps, "--train-batch-size", "1", "--num-processes", "2", "--strategy", strategy)
    typed(*command(tiny_i2v, i2v_shards, out, *two, "--max-train-steps", "3"))
    typed(*command(tiny_i2v, i2v_shards, out, *two, "--resume-from-checkpoint", "latest"))
    assert_like_alone(one, out)
    clips = sorted(path.relative_to(one) for path in one.glob("validation/*/*.safetensors"))
    assert {path.parent.name for path in clips} == {"step-0", "step-2", "step-4"}
    for clip in clips:
        assert apart(load_file(one / clip), load_file(out / clip)) <= 1e-4, clip


def gone_on(whole: Path, out: Path, words: list[str]) -> None:
    """The command for `out` from the third update of `whole` leaves the same, to the byte."""
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    typed(*words, "--resume-from-checkpoint", "latest")
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(files) >= 7  # LoRA files, weights and moments of both roles
    for file in files:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.long
def test_three_processes_that_do_not_divide_the_weights(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Gone on from the middle, with activations in CPU memory from there on."""
    one, whole, out = (tmp_path / name for name in ("one", "whole", "out"))
    distill(tiny_t2v, t2v_shards, one, *RUN, "--train-batch-size", "3")
    three = ("--train-batch-size", "1", "--num-processes", "3", "--strategy", "zero3")
    typed(*command(tiny_t2v, t2v_shards, whole, *three, "--checkpointing-steps", "3"))
    assert_like_alone(one, whole)
    gone_on(whole, out, command(tiny_t2v, t2v_shards, out, *three, "--activation-offloading"))


@pytest.mark.long
def test_moments_in_8_bits_in_two_processes(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Of matrices that are large enough for it; gone on from the middle."""
    one, whole, out = (tmp_path / name for name in ("one", "whole", "out"))
    eight = ("--use-8bit-adam", "--rank", "128", "--checkpointing-steps", "3")
    distill(tiny_t2v, t2v_shards, one, *RUN, *SINGLE, *eight)
    typed(*command(tiny_t2v, t2v_shards, whole, *IN_TWO, *eight))
    assert_like_alone(one, whole)
    gone_on(whole, out, command(tiny_t2v, t2v_shards, out, *IN_TWO, *eight))


@pytest.mark.long
def test_one_run_may_go_through_all_strategies(
    alone: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chain = [("single", SINGLE)] + [(s, IN_TWO) for s in ("ddp", "zero2", "zero3", "fsdp")]
    for steps, (strategy, cut) in enumerate(chain, start=1):
        # The last --max-train-steps counts; each leg is one update of either role.
        leg = ("--strategy", strategy, "--max-train-steps", str(steps))
        go_on = ("--resume-from-checkpoint", "latest")
        typed(*command(tiny_t2v, t2v_shards, out, *cut, *leg, *go_on))
    assert_like_alone(alone, out)


def test_accelerate_launches_it_too(
    alone: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """From a folder where modules are called as ours."""
    foreign_names(tmp_path)
    out = tmp_path / "out"
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    typed(
        accelerate, "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "--no_python",
        *command(tiny_t2v, t2v_shards, out, *IN_TWO[:2]), cwd=tmp_path,
    )  # fmt: skip
    assert_like_alone(alone, out)


def _started(words: list[str], out: Path) -> "subprocess.Popen[str]":
    """The command once it has saved a first checkpoint."""
    process = subprocess.Popen(words, env=_environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-1").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process


def _ranks_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


ENDLESS = ("--max-train-steps", "5000", "--checkpointing-steps", "1")


@pytest.mark.long
def test_one_killed_process_ends_the_run(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    strategy = "zero3"
    out = tmp_path / "out"
    words = command(tiny_t2v, t2v_shards, out, *IN_TWO, *ENDLESS, "--strategy", strategy)
    process = _started(words, out)
    ranks = _ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "process 1 was killed by signal 9" in said
    assert "--resume-from-checkpoint latest" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    saved = max(int(p.name.split("-")[1]) for p in out.glob("checkpoint-?*") if "+" not in p.name)
    more = ("--max-train-steps", str(saved + 1), "--resume-from-checkpoint", "latest")
    typed(*command(tiny_t2v, t2v_shards, out, *IN_TWO, *more, "--strategy", strategy))
    assert (out / f"checkpoint-{saved + 1}").exists()


@pytest.mark.long
def test_a_signal_stops_all_after_one_update(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(tiny_t2v, t2v_shards, out, *IN_TWO, *ENDLESS, "--strategy", "fsdp")
    process = _started(words, out)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.count("stopped  by a signal") == 1
    assert said.count("LoRA     ") == 3
