"""Wan 2.1 t2v: one expert and no boundary, from mp4 to shards to a LoRA to clips."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.models import tiny_model
from tests.train.conftest import encode
from tests.train.sampling.test_sample import frames, sample
from tests.train.test_distill import distill, final_bytes, losses
from train.saving.provenance import read_provenance


def test_one_expert_goes_the_whole_way(dataset: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "wan21", "t2v", two_experts=False, seed=3)
    shards = encode(dataset, model, tmp_path / "shards")
    fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
    assert fingerprint["mode"] == "t2v" and "image" not in fingerprint

    out = distill(model, shards, tmp_path / "out", "--max-train-steps", "1")
    assert sorted(final_bytes(out)) == [
        "lora-full-comfyui.safetensors",
        "lora-full-diffusers.safetensors",
        "lora-full-kohya.safetensors",
    ]
    curves = losses(out)
    values = [loss for curve in curves.values() for _, loss in curve]
    assert len(values) == 3 and np.isfinite(values).all() and min(values) > 0
    lora = out / "lora-full-diffusers.safetensors"
    told = read_provenance(lora)
    assert (told.expert, told.boundary, told.flow_shift) == ("full", None, 5.0)

    clips = sample(model, tmp_path / "clips", "--lora", str(lora))
    assert frames(clips / "student-000.mp4").shape == (9, 48, 80, 3)
    assert Image.open(clips / "student-sheet.png").width > 6 * 80
