"""`wantrain bench`: what it counts is right; its times are for people."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.train.test_distill import SMALL, WANTRAIN
from train.cli.app import app as wantrain

# Bytes of the LoRAs of `tiny_t2v`, for two roles in fp32: of rank 4, for q, k, v of both attentions
# (32 to 32) and both layers of the ffn (48 wide), in two blocks.
LORAS = 2 * 2 * 4 * 4 * (6 * (32 + 32) + 2 * (32 + 48))


def base_bytes(model: Path) -> int:
    """Of the low-noise expert in fp32, as its file has it."""
    weights = load_file(model / "transformer_2" / "diffusion_pytorch_model.safetensors")
    return sum(4 * tensor.numel() for tensor in weights.values())


def bench(model: Path, shards: Path, *more: str) -> None:
    wantrain(
        ["bench", "--model", str(model), "--shards", str(shards), *SMALL, *more],
        standalone_mode=False,
    )


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_it_watches_the_loop_itself(
    tiny_t2v: Path,
    t2v_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accumulation: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bench(
        tiny_t2v, t2v_shards, "--mixed_precision", "no", "--cycles", "2", "--json", "found.json",
        "--gradient-accumulation-steps", accumulation,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]  # no --output-dir
    said = capsys.readouterr()
    assert "saved " not in said.err and "LoRA " not in said.err  # gigabytes of a large model
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    loop = found["loop"]
    assert loop["updates"] == 6 and set(loop["by_role"]) == {"generator", "critic"}
    assert sum(loop["parts"].values()) == pytest.approx(loop["seconds"])
    assert all(seconds > 0 for seconds in loop["parts"].values())
    data = loop["parts"]["before an update's first pass: data, noise"]
    assert 0 < loop["data_wait"] < data
    passes = loop["parts"]["forward passes"] + loop["parts"]["backward passes"]
    assert found["ratios"]["over_passes"] == pytest.approx(loop["seconds"] / passes)

    work = found["work"]
    assert set(work["by_role"]) == {"generator", "critic"}
    assert work["peak"] is None and found["ratios"]["utilisation"] is None  # a CPU's is not known
    done = 4 * work["by_role"]["critic"] + 2 * work["by_role"]["generator"]
    assert work["in_passes"] == pytest.approx(done / passes)
    assert work["overall"] == pytest.approx(done / loop["seconds"])

    assert found["peak"] > 1e8 and found["planned"] > base_bytes(tiny_t2v) + LORAS
    assert found["reserved"] is None  # there is no GPU

    for line in (
        "step time / only passes: ", "memory   peak ", "GiB; planned 0.00",
        "TFLOP/s inside the passes", "work     critic: ",
    ):  # fmt: skip
        assert line in said.out


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])  # DeepSpeed makes steps in parts
def test_two_processes(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, strategy: str) -> None:
    """The first one's updates."""
    ended = subprocess.run(
        [
            WANTRAIN, "bench", "--model", tiny_t2v, "--shards", t2v_shards, *SMALL,
            "--json", tmp_path / "found.json", "--device", "cpu",
            "--gen-update-interval", "2", "--strategy", strategy, "--num-processes", "2",
        ],
        check=True, timeout=300, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    report = json.loads((tmp_path / "found.json").read_text())
    loop = report["loop"]
    assert report["processes"] == 2 and ", process 0 of 2\n" in ended.stdout
    assert loop["updates"] == 3 and set(loop["by_role"]) == {"generator", "critic"}
    assert sum(loop["parts"].values()) == pytest.approx(loop["seconds"])


def test_a_dry_run_measures_nothing(
    tiny_t2v: Path, t2v_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(tiny_t2v, t2v_shards, "--dry-run")
    assert "update   critic" not in capsys.readouterr().out


def test_two_passes_before_one_backward(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    """Flow matching beside DMD: the generator's loss has a graph through two passes."""
    more = ("--fm-loss-weight", "0.5", "--json", str(tmp_path / "found.json"))
    bench(tiny_t2v, t2v_shards, *more)
    loop = json.loads((tmp_path / "found.json").read_text())["loop"]
    assert sum(loop["parts"].values()) == pytest.approx(loop["seconds"])
