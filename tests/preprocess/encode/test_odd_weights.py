"""`wanprep` on models whose files hold tensors too many: the clean model's cache, or none."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.preprocess.conftest import Cache, Ran, wanprep
from tests.shared.models.test_weights import scaled

TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
CLIP = "image_encoder/model.safetensors"
FILES = {"text_encoder": TEXT, "vae": VAE, "image_encoder": CLIP}


def changed(model: Path, folder: Path, file: str, state: dict[str, torch.Tensor]) -> Path:
    """The model with one file replaced."""
    shutil.copytree(model, folder, copy_function=os.link)
    (folder / file).unlink()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.effect_noise((70, 64), 60).convert("RGB").save(folder / "noise.png")
    (folder / "noise.txt").write_text("a picture of noise")
    return folder


def encode(model: Path, data: Path, output: Path, command: str = "encode") -> Ran:
    return wanprep(
        *(command, "--model", model, "--train-data-dir", data, "--output", output),
        *("--size", 64, "--device", "cpu"),
    )


def test_scaled_encoders_give_the_cache_of_what_they_stand_for(
    tiny_t2v: Path, data: Path, tmp_path: Path
) -> None:
    held, meant = scaled(load_file(tiny_t2v / TEXT), "old")
    outputs = []
    for name, state in (("odd", held), ("clean", meant)):
        model = changed(tiny_t2v, tmp_path / name, TEXT, state)
        outputs.append(tmp_path / f"{name}-shards")
        ran = encode(model, data, outputs[-1])
        assert ran.code == 0, ran.err
    odd, clean = (Cache.open(output) for output in outputs)
    assert odd.contents() == clean.contents() and len(odd.contents()) > 2
    assert odd.index.fingerprint == clean.index.fingerprint
    ran = encode(tmp_path / "odd", data, outputs[1])
    assert ran.code == 0 and "1 in the shards, 0 to encode" in ran.err


@pytest.mark.parametrize("command", ["encode", "plan"])
@pytest.mark.parametrize("component", FILES)
def test_tensors_too_many_end_the_command(
    component: str, command: str, tiny_wan21_i2v: Path, data: Path, tmp_path: Path
) -> None:
    """Before anything is written; of a plan, too, which loads no encoder."""
    file = FILES[component]
    state = load_file(tiny_wan21_i2v / file)
    adapter = {"encoder.x.lora_A.weight": torch.ones(2, 2)}
    for number, (more, message) in enumerate(
        (
            (adapter, "1 weights too many, the first encoder.x.lora_A.weight: an adapter"),
            ({"mystery.bias": torch.ones(2)}, "1 weights too many, the first mystery.bias."),
        )
    ):
        model = changed(tiny_wan21_i2v, tmp_path / f"model{number}", file, state | more)
        ran = encode(model, data, tmp_path / "shards", command)
        assert ran.code == 1 and f"{model / file} has {message}" in ran.err, ran.err
        assert "Traceback" not in ran.err
        assert not list((tmp_path / "shards").glob("*.tar"))


def test_commands_on_a_cache_refuse_them(tiny_t2v: Path, data: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert encode(tiny_t2v, data, shards).code == 0
    more = {"mystery.bias": torch.ones(2)}
    model = changed(tiny_t2v, tmp_path / "text", TEXT, load_file(tiny_t2v / TEXT) | more)
    ran = wanprep(
        *("recaption", "--shards", shards, "--model", model, "--name", "other"),
        *("--same-captions", "--device", "cpu"),
    )
    assert ran.code == 1 and f"{model / TEXT} has 1 weights too many" in ran.err, ran.err
    more = {"decoder.conv_in.lora_A.weight": torch.ones(2, 2)}
    model = changed(tiny_t2v, tmp_path / "vae", VAE, load_file(tiny_t2v / VAE) | more)
    ran = wanprep(
        *("verify", "--shards", shards, "--decode", 1, "--train-data-dir", data),
        *("--model", model, "--output", tmp_path / "decoded", "--device", "cpu"),
    )
    assert ran.code == 1 and f"{model / VAE} has 1 weights too many" in ran.err, ran.err
    assert "an adapter (a LoRA or the like)" in ran.err
