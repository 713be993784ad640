"""`wantrain export`: other forms of LoRA files and of checkpoints."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.io.hashing import digest_of
from tests.train.methods.test_finetune import finetune
from tests.train.model.test_lora_files import (
    diffusers,
    kohya,
    original,
    tensors_of,
    with_alpha,
    written,
)
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.model.lora_files import read_lora
from train.saving.lora_formats import FORMS


def export(*arguments: object) -> None:
    wantrain(["export", *map(str, arguments)], standalone_mode=False)


@pytest.fixture(scope="module")
def run(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two generator updates whose LoRA is an average, with both checkpoints."""
    return distill(
        tiny_t2v, t2v_shards, tmp_path_factory.mktemp("run") / "out", "--max-train-steps", "2",
        "--checkpointing-steps", "1", "--ema-decay", "0.5", "--ema-start", "1",
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_files_are_those_of_the_run_to_the_byte(form: str, run: Path, tmp_path: Path) -> None:
    """From the checkpoint of its end, and from each of its files."""
    expected = (run / f"lora-low-{form}.safetensors").read_bytes()
    output = tmp_path / "x.safetensors"
    export("--checkpoint", run / "checkpoint-2", "--to", form, "--output", output)
    assert output.read_bytes() == expected
    for other in FORMS:
        output.unlink()
        export("--lora", run / f"lora-low-{other}.safetensors", "--to", form, "--output", output)
        assert output.read_bytes() == expected, other


def test_a_run_of_wantrain_lora_is_exported_alike(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    run = finetune(tiny_t2v, t2v_shards, tmp_path / "run", "--max-train-steps", "1")
    output = tmp_path / "x.safetensors"
    for form in FORMS:
        export("--checkpoint", run / "checkpoint-1", "--to", form, "--output", output)
        assert output.read_bytes() == (run / f"lora-low-{form}.safetensors").read_bytes()


def test_an_earlier_checkpoint_is_an_earlier_lora(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    export(
        "--checkpoint", run / "checkpoint-1", "--to", "diffusers", "--output", output,
        "--save-precision", "fp32",
    )  # fmt: skip
    saved = load_file(run / "checkpoint-1" / "generator_ema.safetensors")
    read = read_lora(output)
    assert read.lora.weights.keys() == saved.keys()
    assert all(torch.equal(read.lora.weights[name], saved[name]) for name in saved)
    assert json.loads(read.metadata["wandistill"])["updates"] == 1
    assert read.metadata["ss_steps"] == "1"


@pytest.mark.parametrize("name", [original(), kohya("lora_unet__"), diffusers("transformer_2.")])
@pytest.mark.parametrize("form", FORMS)
def test_other_peoples_loras_keep_strength_and_metadata(
    name: object, form: str, tmp_path: Path
) -> None:
    """Alphas that differ from layer to layer, ranks too, blocks without a layer."""
    tensors = with_alpha(tensors_of(name)) | with_alpha(tensors_of(name, layers=["ffn.0"], rank=2))  # type: ignore[arg-type]
    for key in [key for key in tensors if "blocks.1" in key or "blocks_1" in key]:
        if "cross_attn" in key or "attn2" in key:
            del tensors[key]
    source = written(tmp_path / "a.safetensors", tensors, ss_tag="theirs", format="pt")
    export("--lora", source, "--to", form, "--output", tmp_path / "b.safetensors")
    before, after = read_lora(source).lora, read_lora(tmp_path / "b.safetensors")
    assert (after.form, after.alpha_assumed) == (form, False)
    assert after.metadata["ss_tag"] == "theirs"
    assert after.lora.alphas == before.alphas and set(before.alphas.values()) == {3.0, 5.0}
    assert {before.rank(module) for module in before.modules} == {2, 4}
    for key, tensor in before.weights.items():
        assert torch.equal(after.lora.weights[key], tensor)


def test_precision_is_kept_or_changed(tmp_path: Path) -> None:
    source = written(tmp_path / "a.safetensors", tensors_of(original()))
    output = tmp_path / "b.safetensors"
    for more, dtype in (((), torch.float32), (("--save-precision", "bf16"), torch.bfloat16)):
        export("--lora", source, "--to", "comfyui", "--output", output, *more)
        with safe_open(output, framework="pt") as file:
            key = "diffusion_model.blocks.0.ffn.0.lora_up.weight"
            assert file.get_tensor(key).dtype == dtype


def test_an_alpha_that_nobody_told_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "a.safetensors", tensors_of(original()))
    export("--lora", source, "--to", "kohya", "--output", tmp_path / "b.safetensors")
    assert "a.safetensors has no alpha" in capsys.readouterr().out
    assert set(read_lora(tmp_path / "b.safetensors").lora.alphas.values()) == {4.0}


@pytest.mark.parametrize("form", FORMS)
def test_alpha_is_set_and_with_it_the_strength(
    form: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The matrices stay; VideoX-Fun's files of --use_peft_lora have no alpha in either form."""
    output = tmp_path / "b.safetensors"
    for name in (diffusers("base_model.model."), kohya("lora_unet__")):
        source = written(tmp_path / "a.safetensors", tensors_of(name), format="pt")
        export("--lora", source, "--alpha", 2, "--to", form, "--output", output)
        said = capsys.readouterr().out
        assert "strength 0.5 (alpha 2 / rank)" in said and "has no alpha" not in said
        before, after = read_lora(source).lora, read_lora(output).lora
        for module in before.modules:
            assert torch.equal(after.up(module), before.up(module))
            assert torch.equal(after.down(module), before.down(module))
            assert torch.equal(after.delta(module), before.delta(module) * 0.5)
    for source in (
        ("--lora", run / "lora-low-kohya.safetensors"),
        ("--checkpoint", run / "checkpoint-2"),
    ):
        export(*source, "--alpha", 6, "--to", form, "--output", output)
        metadata = read_lora(output).metadata
        assert set(read_lora(output).lora.alphas.values()) == {6.0}
        assert metadata["ss_network_alpha"] == "6"
        assert json.loads(metadata["wandistill"])["alpha"] == 6
    for alpha in ("nan", "inf", "0"):
        with pytest.raises(UserError, match=r"--alpha: found .*expected a number other than 0"):
            export("--lora", source[1], "--alpha", alpha, "--to", form, "--output", output)


def test_an_alpha_of_the_metadata_may_be_in_the_matrices_already(tmp_path: Path) -> None:
    """musubi-tuner's converter multiplies it in, leaves its tensors out and keeps the metadata."""
    told = {"ss_network_alpha": "1", "ss_network_dim": "4"}
    read = read_lora(written(tmp_path / "a.safetensors", tensors_of(original()), **told))
    assert read.lora.scale("blocks.0.attn1.to_q") == 1
    assert "has alpha 1 of rank 4, which converters multiply into" in (read.note or "")


@pytest.mark.parametrize("fault", ["size", "enospc@2", "enospc@3"])
def test_a_full_disk_leaves_nothing(fault: str, run: Path, tmp_path: Path) -> None:
    """A limit of the system on a file's size, and a disk that is full from some write on."""
    folder = tmp_path / "out"
    folder.mkdir()
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); "
        if fault == "size"
        else f"import os; os.environ['WANDISTILL_FAULT'] = {fault!r}; "
    ) + "from train.cli.app import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "export", "--lora", run / "lora-low-kohya.safetensors",
         "--to", "comfyui", "--output", folder / "x.safetensors"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1 and "--output: can't write" in ran.stderr, ran.stderr
    assert list(folder.iterdir()) == []


def test_a_run_that_diverged_is_not_exported(run: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    file = damaged / "generator_ema.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name][0, 0] = float("nan")
    save_file(weights, file)
    state = json.loads((damaged / "state.json").read_text())
    state.pop("digest")
    state["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (damaged / "state.json").write_text(json.dumps(state | {"digest": digest_of(state)}))
    with pytest.raises(UserError, match=rf"NaN or infinite in {name}: the run diverged"):
        export("--checkpoint", damaged, "--to", "kohya", "--output", tmp_path / "x.safetensors")


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path) -> None:
    to = ("--to", "kohya", "--output", tmp_path / "x.safetensors")
    file = run / "lora-low-kohya.safetensors"
    with pytest.raises(UserError, match="neither --lora nor --checkpoint"):
        export(*to)
    with pytest.raises(UserError, match="both --lora and --checkpoint"):
        export(*to, "--lora", file, "--checkpoint", run / "checkpoint-2")
    with pytest.raises(UserError, match=r"out is not a checkpoint \(no state.json"):
        export(*to, "--checkpoint", run)
    with pytest.raises(
        UserError, match=r"--output: found .*x\.pt, expected a file whose name ends"
    ):
        export("--lora", file, "--to", "kohya", "--output", tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"--output: can't write .*Choose another folder"):
        export("--lora", file, "--to", "kohya", "--output", file / "x.safetensors")
    damaged = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    with (damaged / "generator_ema.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    with pytest.raises(UserError, match=r"checkpoint-2 is damaged: generator_ema\.safetensors has"):
        export(*to, "--checkpoint", damaged)
    assert not (tmp_path / "x.safetensors").exists()
