"""LoRAs and strengths that are no numbers: refused by file and layer, before anything is done."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tests.train.model.test_lora_adapter import trained
from tests.train.model.test_lora_files import original, tensors_of, with_alpha
from tests.train.saving.test_merge import merge
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.model.lora_files import read_lora
from train.saving.export import lora_path


def export(*arguments: object) -> None:
    wantrain(["export", *map(str, arguments)], standalone_mode=False)


def poisoned(model: Path, folder: Path, value: float, dtype: torch.dtype) -> Path:
    """A LoRA of our own with one bad number in its last tensor."""
    trained(model, "low", ("q", "ffn.2"), folder)
    path = lora_path(folder, "low", "comfyui")
    state = {name: t.to(dtype) if t.dim() else t for name, t in load_file(path).items()}
    state["diffusion_model.blocks.1.ffn.2.lora_up.weight"][3, 2] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(state, path, metadata)
    return path


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.bfloat16),
        (float("inf"), torch.float16),
        (float("-inf"), torch.float32),
        (float("nan"), torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_every_command_refuses_what_is_not_finite(
    value: float, dtype: torch.dtype, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    path = poisoned(tiny_t2v, tmp_path, value, dtype)
    out, model = tmp_path / "out", ("--model", str(tiny_t2v))
    low = (*model, "--boundary-type", "low")
    message = (
        r"lora-low-comfyui\S+: \S+blocks\.1\.ffn\.2\.lora_up\.weight holds NaN or infinite values"
    )
    for command in (
        ["merge", *model, "--lora", path, "--output", out],
        ["export", "--lora", path, "--to", "kohya", "--output", out / "x.safetensors"],
        ["sample", *model, "--lora", path, "--prompt", "x", "--output", out],
        ["sample", *model, "--teacher", "--base-lora", path, "--prompt", "x", "--output", out],
        ["distill", *low, "--shards", t2v_shards, "--base-lora", path, "--output-dir", out],
        ["lora", *low, "--shards", t2v_shards, "--init-lora", path, "--output-dir", out],
        ["distill", *low, "--shards", t2v_shards, "--init-lora", f"{path}:0.5",
         "--output-dir", out],
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            wantrain(list(map(str, command)), standalone_mode=False)
        assert not out.exists(), command


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -0.0], ids=str)
def test_alphas_that_are_no_strength(alpha: float, tmp_path: Path) -> None:
    """Zero adds nothing in ComfyUI and is the rank for kohya's tools; the cure names one."""
    tensors = with_alpha(tensors_of(original()))
    tensors["diffusion_model.blocks.1.ffn.0.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.0\) is .*export --alpha"):
        read_lora(tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    export("--lora", tmp_path / "a.safetensors", "--alpha", 2, "--to", "kohya", "--output", output)
    assert set(read_lora(output).lora.alphas.values()) == {2.0}


def test_integers_are_no_matrices(tmp_path: Path) -> None:
    tensors = tensors_of(original())
    tensors["diffusion_model.blocks.0.ffn.0.lora_up.weight"] = torch.ones(20, 4, dtype=torch.int8)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"ffn\.0\.lora_up\.weight holds torch\.int8; expected"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("strength", ["nan", "inf", "0", "-0", "1e999", "x", "1.0.0"])
@pytest.mark.parametrize("option", ["--base-lora", "--init-lora"])
def test_strengths_of_the_command_line(
    option: str, strength: str, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    trained(tiny_t2v, "low", ("q",), tmp_path)
    value = f"{lora_path(tmp_path, 'low', 'kohya')}:{strength}"
    with pytest.raises(UserError, match=rf"{option}: found .*, expected FILE or FILE:X"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()


def test_strengths_of_merge_and_sums_beyond_the_format(tiny_t2v: Path, tmp_path: Path) -> None:
    trained(tiny_t2v, "low", ("q",), tmp_path)
    file, out = lora_path(tmp_path, "low", "kohya"), tmp_path / "out"
    for scale in ("nan", "inf", "0"):
        with pytest.raises(UserError, match=r"--lora-scale: found .*a number other than 0"):
            merge(tiny_t2v, out, "--lora", file, "--lora-scale", scale)
    with pytest.raises(UserError, match=r"at strength 1e\+39 makes blocks\.0\.\S+ .*infinite"):
        merge(tiny_t2v, out, "--lora", file, "--lora-scale", "1e39")
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))
