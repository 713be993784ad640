"""Names in LoRA files as trainers leave them: with wrappers of theirs, in other spellings."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.train.model.test_lora_files import diffusers, kohya, original, tensors_of, with_alpha
from train.model.lora_files import read_lora

PARTS = ("module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "net.")
WRAPPERS = [*PARTS, *map("".join, itertools.permutations(PARTS, 2)), "base_model.model._orig_mod."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_before_and_inside_names(wrapper: str, tmp_path: Path) -> None:
    for make in (original(prefix=""), diffusers(""), kohya()):
        plain = with_alpha(tensors_of(make))
        inside = "_fsdp_wrapped_module._checkpoint_wrapped_module."
        wrapped = {
            wrapper + name.replace("blocks.1.", f"blocks.1.{inside}"): tensor
            for name, tensor in plain.items()
        }
        save_file(plain, tmp_path / "a.safetensors")
        save_file(wrapped, tmp_path / "b.safetensors")
        one, other = (read_lora(tmp_path / f"{name}.safetensors") for name in "ab")
        assert one.form == other.form and one.lora.alphas == other.lora.alphas
        assert one.lora.weights.keys() == other.lora.weights.keys()
        assert all(torch.equal(other.lora.weights[n], t) for n, t in one.lora.weights.items())


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A", "lora_B"),
        ("lora_down", "lora_up"),
        ("lora_A.default", "lora_B.default"),
        ("lora_A.my-adapter.weight", "lora_B.my-adapter.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
def test_spellings_of_the_matrices(down: str, up: str, tmp_path: Path) -> None:
    tensors = tensors_of(original())
    spelled = {
        name.replace("lora_down.weight", down).replace("lora_up.weight", up): tensor
        for name, tensor in tensors.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(spelled, tmp_path / "b.safetensors")
    one, other = (read_lora(tmp_path / f"{name}.safetensors").lora for name in "ab")
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(other.weights[name], tensor) for name, tensor in one.weights.items())
