"""The benchmark for a GPU, without one: all of it runs at a tiny size, within its time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.format.cache import open_cache
from shared.io.store import Store
from shared.models.wan import PUBLISHED
from train.cli.app import app as wantrain

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import random_model  # noqa: E402
from gpu import BY_DEFAULT, Place, Session, configurations, report  # noqa: E402
from random_cache import write_cache  # noqa: E402


def test_a_model_is_of_the_published_shape_and_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_model, "SHARD_BYTES", 200_000)
    model = replace(PUBLISHED["wan2.2-i2v-a14b"], heads=1, ffn_dim=48, layers=2)
    random_model.write_model(model, "transformer_2", tmp_path)
    assert len(list((tmp_path / "transformer_2").glob("*.safetensors"))) > 3
    transformer, loading = WanTransformer3DModel.from_pretrained(
        tmp_path / "transformer_2", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading.values())
    weights = dict(transformer.named_parameters())
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


def test_the_options_of_every_configuration_are_wantrains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(folder=tmp_path, device="cpu", quick=True)
    random_model.write_model(place.published("a14b"), "transformer_2", place.model)
    write_cache(place.cache, place.model, place.bucket(), 2, shard_mb=1)
    assert open_cache(Store(place.cache)).fingerprint["mode"] == "i2v"
    for configuration in configurations().values():
        wantrain(["distill", *place.options(configuration), "--dry-run"], standalone_mode=False)
        assert "2 samples in 1 bucket" in capsys.readouterr().out


def test_what_the_time_does_not_allow_is_left_out(tmp_path: Path) -> None:
    session = Session(Place(folder=tmp_path, device="cuda", quick=False), minutes=1)
    for name in BY_DEFAULT:
        session.run(name, configurations()[name])
    assert "300 s needed, 60 s left" in session.found["a14b"]["left out"]
    assert not any(tmp_path.iterdir())
    session.found["a14b-in-loop"] = {"weights": {"three transformers": 3 * 2**30, "VAE": 2**30}}
    said = report(session.found)
    assert "weights alone 4.0 GiB" in said and "| a14b | left out: 300 s needed" in said


@pytest.mark.long
def test_all_of_it_runs(tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    command = [
        sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--device", "cpu",
        "--only", "1.3b", "1.3b-in-loop", "--json", str(result), "--folder", str(tmp_path),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, Any] = json.loads(result.read_text())
    assert set(found) == {"machine", "1.3b", "1.3b-in-loop", "a14b-in-loop"}
    assert found["machine"]["matmul_flops"] > 0
    assert found["1.3b"]["work"]["by_role"]["generator"] > 0
    in_loop = found["1.3b-in-loop"]
    assert 0 < in_loop["encode"] < in_loop["by_role"]["critic"]
    assert "| 1.3b | " in ran.stdout and "of it encoding" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
