"""Both experts' LoRAs on the validation prompts, at the end of a run of both; and `kill -9`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from rich.console import Console
from safetensors.torch import load_file

import train.sampling.sample
from tests.models import BOUNDARY
from tests.train.conftest import encode, transformers_before_each
from tests.train.strategies.test_strategies import typed
from train.cli.app import app as wantrain
from train.functional.schedule import Schedule
from train.model.roles import Roles
from train.sampling.config import SampleConfig
from train.sampling.sample import sample_clips, student_scheduler

WANTRAIN = str(Path(sys.executable).with_name("wantrain"))
RUN = (
    "--boundary-type", "both", "--rank", "4", "--learning-rate", "3e-2", "--max-train-steps", "2",
    "--dataloader-num-workers", "0", "--train-batch-size", "2", "--device", "cpu",
    "--mixed-precision", "no", "--save-precision", "fp32", "--report-to", "none",
    "--checkpointing-steps", "1", "--validation-steps", "2", "--validation-seeds", "2",
)  # fmt: skip
STUDENT = ("--gen-update-interval", "1", "--gauge-batches", "0", "--flow-shift", "7")
RESUME = ("--resume-from-checkpoint", "latest")
PROMPTS = ("noise that moves", "no noise")
WHERE = Path("validation", "step-2")


@pytest.fixture(scope="module")
def shards(dataset: Path, tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An i2v cache with two validation prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    prompts = [{"prompt": text, "image": str(dataset / "noise.png")} for text in PROMPTS]
    (folder / "p.json").write_text(json.dumps(prompts))
    more = ("--validation-prompts", str(folder / "p.json"), "--dtype", "fp32")
    return encode(dataset, tiny_i2v, folder / "shards", *more)


def words(command: str, model: Path, shards: Path, out: Path, *more: str) -> list[str]:
    places = ("--model", str(model), "--shards", str(shards), "--output-dir", str(out))
    return [command, *places, *RUN, *(STUDENT if command == "distill" else ()), *more]


def run(command: str, model: Path, shards: Path, out: Path, *more: str) -> Path:
    wantrain(words(command, model, shards, out, *more), standalone_mode=False)
    return out


def everything(out: Path) -> dict[str, bytes]:
    """What a run leaves, but for logs, locks of the dead, options (resumed, and where), and what
    says how long it took."""
    files = (path for path in out.rglob("*") if path.is_file())
    found = {str(path.relative_to(out)): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not re.search(r"log|run.toml|\.lock|index.html|metrics.jsonl", name)
    }


@pytest.fixture(scope="module")
def whole(tiny_i2v: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    return run("distill", tiny_i2v, shards, tmp_path_factory.mktemp("joint") / "out")


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("distill", ()),
        ("distill", ("--pairing", "euler")),
        ("lora", ("--flow-shift", "7", "--validation-seeds", "1")),
    ],
)
def test_the_clips_are_those_of_wantrain_sample(
    command: str, more: tuple[str, ...], tiny_i2v: Path, shards: Path, dataset: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both files, the same prompt, image and seed; of plain LoRAs at validation's own steps."""
    out = run(command, tiny_i2v, shards, tmp_path / "out", *more)
    records = json.loads((out / WHERE / "clips.json").read_text())
    assert [(one["prompt"], one["seed"]) for one in records] == [
        (prompt, seed) for prompt in PROMPTS for seed in (42, 43)[: len(records) // len(PROMPTS)]
    ]
    _, steps, high, wide = load_file(out / WHERE / "000.safetensors")["latents"].shape
    config = SampleConfig(
        lora=[out / e / f"lora-{e}-diffusers.safetensors" for e in ("low", "high")],
        prompt=[PROMPTS[0]], model=str(tiny_i2v), image=dataset / "noise.png", height=8 * high,
        width=8 * wide, num_frames=4 * steps - 3, dtype="fp32", device="cpu",
        output=tmp_path / "samples",
    )  # fmt: skip
    if command == "lora":
        config = replace(config, steps=20)
        even = Schedule(
            indices=tuple(1000 - 50.0 * n for n in range(20)), shift=7, boundary=BOUNDARY["i2v"]
        )
        euler = student_scheduler(even, "euler", torch.Generator())
        monkeypatch.setattr(train.sampling.sample, "teacher_scheduler", lambda shift: euler)
    for record in records[:: len(records) - 1]:
        found = load_file(out / WHERE / record["file"])["latents"]
        expected = sampled(replace(config, prompt=[record["prompt"]], seed=record["seed"]))
        assert torch.allclose(found, expected, atol=2e-3 if command == "lora" else 5e-4)
        assert (out / WHERE / record["file"]).with_suffix(".mp4").stat().st_size
    assert (out / WHERE / "sheet.png").exists()
    assert (out / "index.html").read_text().count("<video ") == len(PROMPTS)
    assert len(list((out / WHERE).iterdir())) == 2 * len(records) + 2


def sampled(config: SampleConfig) -> torch.Tensor:
    """Latents (C, T, h, w) that the VAE of `wantrain sample` gets, normalised."""
    latents: list[torch.Tensor] = []
    decode = AutoencoderKLWan.decode

    def seen(vae: Any, z: torch.Tensor, **rest: Any) -> Any:
        facts = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(one).view(1, -1, 1, 1, 1) for one in facts)
        latents.append(((z - mean) / std)[0])
        return decode(vae, z, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKLWan, "decode", seen)
        sample_clips(config, Console(quiet=True))
    return latents[0]


def test_one_expert_is_loaded_at_a_time(
    whole: Path, tiny_i2v: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the clips are there, none; where they are others, they are made again."""
    before = everything(whole)
    loaded = transformers_before_each(monkeypatch)
    run("distill", tiny_i2v, shards, whole, *RESUME)
    assert everything(whole) == before and not loaded
    (whole / WHERE / "clips.json").write_text("[]")  # of another wandistill, say
    run("distill", tiny_i2v, shards, whole, *RESUME)
    assert everything(whole) == before and len(loaded) == 2
    assert loaded[0] == loaded[1]
    run("distill", tiny_i2v, shards, whole, *RESUME, "--validation-seeds", "1")
    assert len(list((whole / WHERE).glob("*.mp4"))) == 2
    run("distill", tiny_i2v, shards, whole, *RESUME)
    assert everything(whole) == before


def test_only_where_it_is_asked_for(
    tiny_i2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = f"validate both experts together: 4 clips, into {tmp_path / 'out' / WHERE}"
    run("distill", tiny_i2v, shards, tmp_path / "out", "--dry-run")
    assert planned in capsys.readouterr().out
    run("distill", tiny_i2v, shards, tmp_path / "out", "--validation-steps", "0")
    assert "validate" not in capsys.readouterr().err
    assert not (tmp_path / "out" / "validation").exists()


def test_stopped_while_they_are_made(
    whole: Path, tiny_i2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "validation")
    velocity = Roles.velocity

    def struck(*given: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return velocity(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Roles, "velocity", struck)
        run("distill", tiny_i2v, shards, out, *RESUME)
    said = capsys.readouterr().err
    assert ended.value.code == 128 + signal.SIGTERM and "resume with the same command" in said
    assert not (out / "validation").exists() and "next  " not in said
    run("distill", tiny_i2v, shards, out, *RESUME)
    assert everything(out) == everything(whole)


@pytest.mark.long
@pytest.mark.parametrize(
    "there",
    [
        "high/checkpoint-1",
        "high/lora-high-diffusers.safetensors",
        "high/workflow-comfyui-api.json",
        "low/checkpoint-1",
        "workflow-comfyui-api.json",
    ],
)
def test_killed_anywhere_and_gone_on(
    there: str, whole: Path, tiny_i2v: Path, shards: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as a file is there: in an expert's run, at its end, between, in the clips."""
    out = tmp_path / "out"
    command = [WANTRAIN, *words("distill", tiny_i2v, shards, out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out / there).exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / WHERE).exists()
    run("distill", tiny_i2v, shards, out, *RESUME)
    assert everything(out) == everything(whole)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_of_several_processes_one_makes_them(
    strategy: str, tiny_i2v: Path, shards: Path, tmp_path: Path
) -> None:
    """Also where the strategy shards the base: the same clips as in one process."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    several = words("distill", tiny_i2v, shards, out, "--strategy", strategy)
    said = typed(WANTRAIN, *several, "--num-processes", "2")
    assert said.count("validate both experts together: 4 clips") == 1
    made = everything(out / WHERE)
    shutil.rmtree(out / "validation")
    again = words("distill", tiny_i2v, shards, out, "--train-batch-size", "4", *RESUME)
    wantrain(again, standalone_mode=False)
    assert everything(out / WHERE) == made and len(made) == 10
