"""`wantrain` on models whose files hold tensors too many: what they stand for, or none."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from shared.errors import UserError
from shared.io.hashing import FileHasher
from shared.models.digest import component_digest
from tests.preprocess.encode.test_odd_weights import TEXT, VAE, changed
from tests.shared.models.test_weights import scaled
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.sampling.test_sample import frames, sample
from tests.train.saving.test_merge import merge
from tests.train.test_distill import distill, final_bytes
from train.sampling.config import DecodeConfig
from train.sampling.decode import decode_clips
from train.sampling.latent_files import LatentClip, latent_bytes
from train.saving.export import lora_path

EXPERT = "transformer_2/diffusion_pytorch_model.safetensors"
ADAPTER = {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)}
MYSTERY = {"mystery.bias": torch.ones(2)}


def spoilt(model: Path, folder: Path, file: str, more: dict[str, torch.Tensor]) -> Path:
    return changed(model, folder, file, load_file(model / file) | more)


def test_training_refuses_a_base_with_tensors_too_many(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """In a dry run, too, as nothing but names tells; that of the other expert is not looked at."""
    for number, more in enumerate((ADAPTER, MYSTERY)):
        model = spoilt(tiny_t2v, tmp_path / f"model{number}", EXPERT, more)
        message = rf"{model / EXPERT} has 1 weights too many, the first {next(iter(more))}"
        for options in (("--dry-run",), ()):
            with pytest.raises(UserError, match=message):
                distill(model, t2v_shards, tmp_path / "out", *options)
        distill(model, t2v_shards, tmp_path / "out", "--dry-run", "--boundary-type", "high")
    assert not list(tmp_path.glob("out/checkpoint*"))


def test_training_refuses_shards_of_what_no_encoder_could_be(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    model = spoilt(tiny_t2v, tmp_path / "model", TEXT, ADAPTER)
    with pytest.raises(UserError, match=rf"{model / TEXT} has 1 weights too many.*an adapter"):
        distill(model, t2v_shards, tmp_path / "out", "--dry-run")


def test_a_scaled_base_trains_as_what_it_stands_for(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    held, meant = scaled(load_file(tiny_t2v / EXPERT), "new")
    outputs = []
    for name, state in (("odd", held), ("clean", meant), ("other", load_file(tiny_t2v / EXPERT))):
        model = changed(tiny_t2v, tmp_path / name, EXPERT, state)
        out = distill(model, t2v_shards, tmp_path / f"{name}-out", "--max-train-steps", "1")
        outputs.append(load_file(out / "lora-low-diffusers.safetensors"))
        assert final_bytes(out)
    odd, clean, other = outputs
    for name, tensor in clean.items():  # but for last bits: mapped memory begins elsewhere
        torch.testing.assert_close(odd[name], tensor, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(t, other[n], rtol=1e-3, atol=1e-5) for n, t in clean.items())


@pytest.mark.parametrize("file", [TEXT, VAE, EXPERT])
def test_sampling_refuses_tensors_too_many(file: str, tiny_t2v: Path, tmp_path: Path) -> None:
    model = spoilt(tiny_t2v, tmp_path / "model", file, MYSTERY)
    message = rf"{model / file} has 1 weights too many, the first mystery\.bias"
    with pytest.raises(UserError, match=message):
        sample(model, tmp_path / "out", "--teacher", "--steps", "1")
    assert not list(tmp_path.glob("out/*.mp4"))


def test_sampling_takes_scales_into_account(tiny_t2v: Path, tmp_path: Path) -> None:
    held, meant = scaled(load_file(tiny_t2v / TEXT), "old")
    clips = []
    for name, state in (("odd", held), ("clean", meant)):
        model = changed(tiny_t2v, tmp_path / name, TEXT, state)
        out = sample(model, tmp_path / f"{name}-out", "--teacher", "--steps", "2")
        clips.append(frames(out / "teacher-000.mp4").astype(int))
    assert abs(clips[0] - clips[1]).mean() < 0.1
    assert clips[0].std() > 0.5


def test_decoding_refuses_a_vae_with_tensors_too_many(tiny_t2v: Path, tmp_path: Path) -> None:
    """By name, not as another VAE than that of the latents."""
    digest = component_digest(tiny_t2v, "vae", FileHasher())
    clip = LatentClip(latents=torch.zeros(16, 1, 4, 4), label="nothing", vae=str(digest))
    (tmp_path / "clip.safetensors").write_bytes(latent_bytes(clip))
    model = spoilt(tiny_t2v, tmp_path / "model", VAE, MYSTERY)
    config = DecodeConfig(
        latents=(tmp_path / "clip.safetensors",), model=str(model), output=tmp_path / "out",
        fps=16, dtype="fp32", device="cpu",
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"{model / VAE} has 1 weights too many"):
        decode_clips(config, Console())


def test_merging_refuses_what_it_would_add_to_wrongly(tiny_t2v: Path, tmp_path: Path) -> None:
    """A LoRA added to codes of fp8 would be scaled with them."""
    trained(tiny_t2v, "low", ALL, tmp_path)
    lora = ("--lora", lora_path(tmp_path, "low", "diffusers"))
    model = spoilt(tiny_t2v, tmp_path / "mystery", EXPERT, MYSTERY)
    with pytest.raises(UserError, match="1 weights too many, the first mystery"):
        merge(model, tmp_path / "out", *lora)
    held, _ = scaled(load_file(tiny_t2v / EXPERT), "old")
    model = changed(tiny_t2v, tmp_path / "scaled", EXPERT, held)
    with pytest.raises(UserError, match=r"holds \d+ fp8 weights with scales beside them"):
        merge(model, tmp_path / "out", *lora)
    assert not (tmp_path / "out").exists()
