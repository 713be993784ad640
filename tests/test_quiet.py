"""No line on the terminal that isn't ours: each begins with a label, or follows one that does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.train.conftest import write_dataset

BIN = Path(sys.executable).parent
SIZE = ("--size", "64", "--video-sample-n-frames", "9", "--video-sample-stride", "1")
LABELS = (
    *("dataset", "model", "probing", "samples", "encoding", "time", "preview", "next:", "cluster"),
    *("actor", "data", "levels", "length", "lora", "saved", "LoRA", "spread", "clip", "sample"),
    *("sheet", "note", "teacher", "student", "steps", "kernel", "found", "waiting", "ComfyUI"),
    *("page", "card"),
)


def lines(*command: str | Path) -> list[str]:
    ran = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, timeout=400)
    text = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == 0, text
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.long
def test_encode_train_and_sample_say_only_their_own(tiny_wan21_i2v: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", clips=2, image=False)
    shards, out, model = tmp_path / "shards", tmp_path / "out", tiny_wan21_i2v
    frame = tmp_path / "frame.png"
    Image.new("RGB", (64, 64), (9, 99, 199)).save(frame)
    said = lines("wanprep", "encode", "--model", model, "--train-data-dir", data, *SIZE,
                 "--output", shards)  # fmt: skip
    said += lines("wantrain", "lora", "--model", model, "--shards", shards, "--output-dir", out,
                  "--boundary-type", "full", "--max-train-steps", "1", "--rank", "4",
                  "--strategy", "zero2", "--num-processes", "2")  # fmt: skip
    said += lines("wantrain", "sample", "--model", model, "--steps", "1", "--height", "64",
                  "--width", "64", "--num-frames", "9", "--image", frame, "--prompt", "a ball",
                  "--lora", out / "lora-full-diffusers.safetensors",
                  "--output", tmp_path / "clips")  # fmt: skip
    alien = [line for line in said if not line.startswith((*LABELS, "  ", str(shards)))]
    assert not alien


@pytest.mark.long
def test_ray_says_nothing_of_its_own(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", clips=2, image=False)
    said = lines("wanprep", "encode", "--model", "toy", "--train-data-dir", data, *SIZE,
                 "--engine", "ray", "--output", tmp_path / "shards")  # fmt: skip
    assert not [line for line in said if not line.startswith((*LABELS, "  ", str(tmp_path)))]
