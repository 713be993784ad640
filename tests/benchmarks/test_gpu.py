"""The benchmark for a GPU, without one: all of it runs at a tiny size, and keeps what it finds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.models.spec import read_model_spec
from shared.models.wan import PUBLISHED, write_configs
from train.cli.app import app as wantrain
from train.model.attention import check_name

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import random_model  # noqa: E402
from gpu import large, machine, vae  # noqa: E402
from gpu.place import Place  # noqa: E402
from gpu.session import FIRST, LEVERS, STEPS, Session, _ended  # noqa: E402
from gpu.table import report  # noqa: E402


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(folder=tmp_path, result=tmp_path / "result.json", device="cpu", quick=True)


def found(place: Place) -> Any:
    return json.loads(place.result.read_text())


def test_a_transformer_is_as_loading_one_makes_it(tmp_path: Path) -> None:
    """Names, shapes, dtypes and buffers as `from_pretrained` in bf16; weights of N(0, 0.02²)."""
    model = replace(PUBLISHED["wan2.2-i2v-a14b"], heads=1, ffn_dim=48, layers=2)
    write_configs(model, tmp_path)
    WanTransformer3DModel.from_config(model.transformer_config()).save_pretrained(tmp_path / "own")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "own", torch_dtype=torch.bfloat16)
    made = random_model.random_transformer(
        read_model_spec(tmp_path), "transformer_2", dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in loaded.named_parameters()
    }
    buffers = dict(loaded.named_buffers())
    assert buffers and all(torch.equal(b, buffers[n]) for n, b in made.named_buffers())
    weights = dict(made.named_parameters())
    assert weights["patch_embedding.weight"].shape[1] == 36  # i2v
    assert torch.equal(weights["blocks.1.attn2.norm_k.weight"], torch.ones(128).bfloat16())
    spread = weights["condition_embedder.text_embedder.linear_1.weight"].float().std()
    assert spread.item() == pytest.approx(0.02, rel=0.02)


def test_true_sizes() -> None:
    """28.6 GB for an expert of A14B, 11.4 for UMT5-XXL."""
    with torch.device("meta"):
        config = PUBLISHED["wan2.2-i2v-a14b"].transformer_config()
        expert = WanTransformer3DModel.from_config(config)
    assert 14.2e9 < sum(p.numel() for p in expert.parameters()) < 14.4e9
    text = random_model.on_meta(
        random_model.UMT5EncoderModel, random_model.umt5_config(quick=False)
    )
    assert 5.6e9 < sum(p.numel() for p in text.parameters()) < 5.8e9


def test_the_options_of_every_step_are_wantrains(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = {
        training
        for step in STEPS.values()
        if (training := getattr(step.work, "keywords", {}).get("training"))
    }
    assert len(trainings) > 10
    for training in trainings:
        if training.options[:1] == ("--attention-backend",):  # found out on the device
            check_name(training.options[1])
            continue
        options = large.make(place, training)
        wantrain(["distill", *options, "--dry-run"], standalone_mode=False)
        assert "8 samples in 1 bucket" in capsys.readouterr().out


def test_what_the_time_does_not_allow_is_left_out_and_kept(tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    session = Session(folder=tmp_path, device="cuda", quick=False, minutes=0.1, json_file=result)
    for number, name in enumerate(FIRST, 1):
        session.run(name)
        assert len(json.loads(result.read_text())) == number
    assert "45 s needed, 6 s left" in session.found["a14b"]["left out"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert "- a14b: left out: 45 s needed" in report(session.found)
    assert all(set(step.seconds) == {8} for step in LEVERS.values())


def test_a_step_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import time; print('there', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / "log").open("w") as log:
        why = _ended([sys.executable, "-c", parent], tmp_path, log, 3)
        failed = _ended([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, log, 60)
    assert (why, failed) == ("stopped after 3 s", "exit code 3")


def test_kernels_and_vae(place: Place) -> None:
    machine.machine(place)
    of = found(place)
    assert of["matmul_flops"] > 0 and of["versions"]["torch"] == torch.__version__
    assert of["attention"]["chosen"] == "FLASH_ATTENTION"
    assert of["attention"]["kernels"]["flash"]["equal_bits"] is True
    assert "left out" in of["attention"]["kernels"]["cudnn"]
    vae.vae(place)
    cases = found(place)["vae"]
    assert len(cases) == 14 and all(one["seconds"] > 0 for one in cases.values())
    said = report({"machine": of, "vae": found(place)})
    assert "torch chooses FLASH_ATTENTION" in said and "| 720p bf16 decode | " in said


@pytest.mark.long
def test_a_run_on_random_weights_is_measured(tmp_path: Path) -> None:
    """Each step a process; what they find, and that nothing is left behind."""
    result = tmp_path / "found.json"
    steps = ["toy-deterministic", "a14b", "a14b-block", "a14b-low-vram", "1.3b-in-loop"]
    command = [
        sys.executable, str(BENCHMARKS / "gpu"), "--quick", "--device", "cpu", "--minutes", "15",
        "--only", *steps, "--json", str(result), "--folder", str(tmp_path),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    of = json.loads(result.read_text())
    assert list(of) == steps
    again = of["toy-deterministic"]["runs"]["deterministic again"]
    assert again["equal_bits"] and again["difference"] == 0
    assert of["a14b"]["work"]["by_role"]["generator"] > 0 and of["a14b"]["seconds"]["build"] > 0
    assert of["a14b-low-vram"]["seconds"]["pinning"] > 0
    assert of["a14b-block"]["generator"]["seconds"] > 0
    assert of["1.3b-in-loop"]["encode"] > 0 and of["1.3b-in-loop"]["by_role"]["critic"] > 0
    assert "| a14b-low-vram | 2 | " in ran.stdout and "of it encoding" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
