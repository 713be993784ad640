"""`make demo`'s script: the main job on the bundled toy, with fewer updates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.demo import moved

ROOT = Path(__file__).parents[1]


def test_a_lora_whose_b_is_zero_has_not_moved(tmp_path: Path) -> None:
    names = ("x.lora_A.weight", "x.lora_B.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "zero.safetensors")
    tensors = {names[0]: torch.ones(2, 2), names[1]: torch.tensor([[0.0, -3e-7], [0.0, 0.0]])}
    save_file(tensors, tmp_path / "moved.safetensors")
    assert moved(tmp_path / "zero.safetensors") == 0
    assert moved(tmp_path / "moved.safetensors") > 0


@pytest.mark.long
def test_the_demo_makes_everything_it_names_from_empty_outputs(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    (out / "shards").mkdir(parents=True)
    (out / "shards" / "of-yesterday.tar").write_bytes(b"")
    ran = subprocess.run(
        [sys.executable, "scripts/demo.py", "--output", str(out), "--steps", "1", "--seed", "7"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert not (out / "shards" / "of-yesterday.tar").exists()
    for line in ran.stdout.split("Made:")[1].strip().splitlines():
        path = Path(line.split(maxsplit=1)[1].split()[-1])
        assert path.exists(), line
    sheet = Image.open(out / "contact-sheet.png")
    assert sheet.height > 12 * 128  # source, teacher twice and student of three prompts
    assert len(list((out / "samples").glob("*/*.mp4"))) == 9
    page = (out / "index.html").read_text()
    assert page.count("<video") == 12 and page.count("<svg") == 4
    for passes in (80, 8, 4):
        assert f"<small>{passes} transformer passes" in page
