"""`wantrain merge`: the merged model does what base and LoRA did together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from tests.models import tiny_model
from tests.original_layout import TRANSFORMER, renamed, write_original
from tests.train.model.test_lora_adapter import ALL, EXPERTS, applied, outputs, trained
from tests.train.model.test_lora_files import diffusers, tensors_of, written
from train.cli.app import app as wantrain
from train.model.base import load_base
from train.model.lora_files import read_lora
from train.model.lora_names import Form
from train.options import Expert
from train.saving.export import lora_path

CPU = torch.device("cpu")
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def merge(model: Path, output: Path, *arguments: object) -> Path:
    command = ["merge", "--model", model, "--output", output, *arguments]
    wantrain([str(argument) for argument in command], standalone_mode=False)
    return output


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("mode", "targets", "form"),
    [("t2v", ALL, "diffusers"), ("i2v", ("q", "o"), "comfyui"), ("t2v", ("ffn.2", "k"), "kohya")],
)
def test_both_experts_do_what_was_trained(
    mode: str, targets: tuple[str, ...], form: Form, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    model = tiny_i2v if mode == "i2v" else tiny_t2v
    roles = {expert: trained(model, expert, targets, tmp_path) for expert, _ in EXPERTS}
    loras = [
        text for expert in roles for text in ("--lora", str(lora_path(tmp_path, expert, form)))
    ]
    merged = merge(model, tmp_path / "merged", *loras, "--max-shard-size", "60KB")
    kind = WanImageToVideoPipeline if mode == "i2v" else WanPipeline
    pipeline = kind.from_pretrained(merged)
    for expert, component in EXPERTS:
        found = applied(getattr(pipeline, component), mode)
        assert torch.allclose(found, outputs(roles[expert], mode)[0], rtol=1e-4, atol=1e-5)
        files = sorted((merged / component).glob("*.safetensors"))
        assert len(files) > 2 and files[0].name.endswith(f"-00001-of-{len(files):05d}.safetensors")
        index = json.loads((merged / component / INDEX).read_text())
        assert set(index["weight_map"]) == set(state_of(model / component))
        assert all(file.stat().st_size < 80_000 for file in files)


@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_weights_keep_their_dtypes_and_are_summed_in_fp32(tmp_path: Path, scale: float) -> None:
    model = tiny_model(tmp_path / "model", "t2v", dtype=torch.bfloat16)
    transformer = model / "transformer"
    state = state_of(transformer)
    state["scale_shift_table"] = state["scale_shift_table"].float()  # a folder of two dtypes
    save_file(state, transformer / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    trained(model, "high", ("q", "ffn.0"), tmp_path)
    file = lora_path(tmp_path, "high", "diffusers")
    merged = merge(model, tmp_path / "merged", "--lora", file, "--lora-scale", scale)
    after = state_of(merged / "transformer")
    lora = read_lora(file).lora
    changed = {f"{module}.weight" for module in lora.modules}
    assert changed < set(state) and len(changed) == 6
    for name, before in state.items():
        if name in changed:
            module = name.removesuffix(".weight")
            delta = lora.up(module).double() @ lora.down(module).double() * (scale * 1 / 4)
            expected = (before.double() + delta).to(torch.bfloat16)
            off = (after[name].float() - expected.float()).abs()
            # float64 and fp32 sums round to bf16 differently only where they lie between two.
            assert (off > 0).float().mean() < 0.01 and not torch.equal(after[name], before)
        else:
            assert torch.equal(after[name], before) and after[name].dtype == before.dtype
    with safe_open(next((merged / "transformer").glob("*.safetensors")), framework="pt") as opened:
        (told,) = json.loads(opened.metadata()["wandistill"])["merged"]
    assert (told["expert"], told["lora_scale"], told["provenance"]["rank"]) == ("high", scale, 4)


def test_the_rest_of_the_folder_goes_along(tiny_t2v: Path, tmp_path: Path) -> None:
    """Weights as second names of the same file, what people edit as copies."""
    trained(tiny_t2v, "low", ("q",), tmp_path)
    merged = merge(tiny_t2v, tmp_path / "merged", "--lora", lora_path(tmp_path, "low", "diffusers"))
    before = {file.relative_to(tiny_t2v) for file in tiny_t2v.rglob("*") if file.is_file()}
    assert before == {file.relative_to(merged) for file in merged.rglob("*") if file.is_file()}
    for file in before:
        old, new = tiny_t2v / file, merged / file
        if file.parent.name == "transformer_2" and file.suffix == ".safetensors":
            assert old.read_bytes() != new.read_bytes()
        else:
            assert old.read_bytes() == new.read_bytes()
            assert (old.stat().st_ino == new.stat().st_ino) == (file.suffix == ".safetensors")
    assert not list(tmp_path.glob("*.tmp"))


def test_several_loras_for_one_expert_add_up(tiny_t2v: Path, tmp_path: Path) -> None:
    for name, targets in (("a", ("q", "v")), ("b", ("q", "o"))):
        trained(tiny_t2v, "high", targets, tmp_path / name)
    a, b = (lora_path(tmp_path / name, "high", "kohya") for name in "ab")
    both = merge(tiny_t2v, tmp_path / "both", "--lora", a, "--lora", b)
    one = merge(tiny_t2v, tmp_path / "one", "--lora", a)
    two = merge(one, tmp_path / "two", "--lora", b)
    for name, tensor in state_of(both / "transformer").items():
        assert torch.allclose(tensor, state_of(two / "transformer")[name], atol=1e-6)
    assert not torch.equal(
        state_of(both / "transformer")["blocks.0.attn1.to_out.0.weight"],
        state_of(one / "transformer")["blocks.0.attn1.to_out.0.weight"],
    )


def test_a_lora_for_all_steps_leaves_the_other_expert_out(tiny_t2v: Path, tmp_path: Path) -> None:
    roles = trained(tiny_t2v, "full", ALL, tmp_path)
    merged = merge(
        tiny_t2v, tmp_path / "merged", "--lora", lora_path(tmp_path, "full", "diffusers")
    )
    assert not (merged / "transformer_2").exists()
    assert not read_model_spec(merged).two_experts
    pipeline = WanPipeline.from_pretrained(merged)
    assert pipeline.transformer_2 is None and pipeline.config.boundary_ratio is None
    found = applied(pipeline.transformer, "t2v")
    assert torch.allclose(found, outputs(roles, "t2v")[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_layout_gives_the_same_weights(
    tiny_i2v: Path, tmp_path: Path, prefix: str
) -> None:
    original = write_original(tiny_i2v, tmp_path / "original", prefix=prefix)
    trained(tiny_i2v, "low", ALL, tmp_path)
    lora = ("--lora", lora_path(tmp_path, "low", "comfyui"), "--max-shard-size", "60KB")
    states = []
    for name, model in (("one", tiny_i2v), ("two", original)):
        merged = merge(model, tmp_path / name, *lora)
        base = load_base(
            read_model_spec(merged), "low", precision="no", device=CPU, gradient_checkpointing=False
        )
        states.append(base.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    names = [file.name for file in sorted((tmp_path / "two" / "low_noise_model").iterdir())]
    assert "config.json" in names and INDEX in names
    assert (tmp_path / "two" / "Wan2.1_VAE.pth").samefile(original / "Wan2.1_VAE.pth")


def test_original_layout_of_one_expert(tmp_path: Path) -> None:
    """Its weights lie beside everything else."""
    model = tiny_model(tmp_path / "model", "t2v", two_experts=False)
    original = write_original(model, tmp_path / "original")
    roles = trained(model, "full", ("k", "ffn.0"), tmp_path, boundary=None)
    merged = merge(
        original, tmp_path / "merged", "--lora", lora_path(tmp_path, "full", "kohya"),
        "--max-shard-size", "60KB",
    )  # fmt: skip
    base = load_base(
        read_model_spec(merged), "full", precision="no", device=CPU, gradient_checkpointing=False
    )
    found = applied(base, "t2v")
    assert torch.allclose(found, outputs(roles, "t2v")[0], rtol=1e-4, atol=1e-5)


def foreign(model: Path, folder: Path, prefix: str) -> Path:
    """A LoRA of the model's first expert that says nothing of its training."""
    trained(model, "high", ("q",), folder)
    tensors = load_file(lora_path(folder, "high", "diffusers"))
    renamed = {name.replace("transformer.", prefix): tensor for name, tensor in tensors.items()}
    return written(folder / "foreign.safetensors", renamed)


def test_loras_of_others_are_told_apart(
    tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = foreign(tiny_t2v, tmp_path, "transformer.")
    with pytest.raises(UserError, match=r"does not name its expert, .* --boundary-type high, low"):
        merge(tiny_t2v, tmp_path / "x", "--lora", silent)
    by_option = merge(tiny_t2v, tmp_path / "a", "--lora", silent, "--boundary-type", "low")
    assert "has no alpha" in " ".join(capsys.readouterr().err.split())
    low = foreign(tiny_t2v, tmp_path, "transformer_2.")
    by_name = merge(tiny_t2v, tmp_path / "b", "--lora", low)
    for merged in (by_option, by_name):
        files = [
            merged / component / "diffusion_pytorch_model.safetensors"
            for component in ("transformer", "transformer_2")
        ]
        same = [
            file.read_bytes() == (tiny_t2v / file.relative_to(merged)).read_bytes()
            for file in files
        ]
        assert same == [True, False]


def test_another_base_is_warned_of(
    tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny_t2v, "high", ("q",), tmp_path)  # whose provenance names no base
    merge(tiny_t2v, tmp_path / "x", "--lora", lora_path(tmp_path, "high", "diffusers"))
    assert "was trained on other weights than" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_merged_is_said(tiny_t2v: Path, tiny_ti2v: Path, tmp_path: Path) -> None:
    experts: tuple[Expert, ...] = ("high", "full")
    for expert in experts:
        trained(tiny_t2v, expert, ("q",), tmp_path)
    high, full = (lora_path(tmp_path, expert, "diffusers") for expert in experts)
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"--output: .* is there already"):
        merge(tiny_t2v, tmp_path, "--lora", high)
    with pytest.raises(UserError, match="lies inside the model's folder"):
        merge(tiny_t2v, tiny_t2v / "merged", "--lora", high)
    with pytest.raises(UserError, match="found LoRAs for full, high; a full one replaces"):
        merge(tiny_t2v, output, "--lora", high, "--lora", full)
    with pytest.raises(UserError, match=r"--boundary-type: found low, but .* is for high"):
        merge(tiny_t2v, output, "--lora", high, "--boundary-type", "low")
    with pytest.raises(UserError, match=r"for the high-noise expert, .* has only one transformer"):
        merge(tiny_ti2v, output, "--lora", high)
    with pytest.raises(UserError, match=r"--max-shard-size: found 'big', expected a size such as"):
        merge(tiny_t2v, output, "--lora", high, "--max-shard-size", "big")
    with pytest.raises(UserError, match="--lora-scale: found nan"):
        merge(tiny_t2v, output, "--lora", high, "--lora-scale", "nan")
    other = written(tmp_path / "other.safetensors", tensors_of(diffusers("transformer.")))
    with pytest.raises(UserError, match=r"adapts blocks\.0.* of shape \[12, 12\]"):
        merge(tiny_t2v, output, "--lora", other, "--boundary-type", "high")
    original = write_original(tiny_t2v, tmp_path / "original")
    with pytest.raises(UserError, match="Use the model in diffusers' layout"):
        merge(original, output, "--lora", full)
    twice = tiny_model(tmp_path / "twice", "t2v")
    weights = twice / "transformer" / "diffusion_pytorch_model.safetensors"
    (weights.parent / "other.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match=r"other\.safetensors does not belong to the weights of"):
        merge(twice, output, "--lora", high)
    (weights.parent / "other.safetensors").unlink()
    weights.write_bytes(weights.read_bytes()[:99])
    message = r"cannot read .*pytorch_model\.safetensors \(SafetensorError"
    with pytest.raises(UserError, match=message):
        merge(twice, output, "--lora", high)
    assert not output.exists() and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.diffusion_model.", "net._fsdp_wrapped_module."]
)
def test_the_merged_names_are_diffusers_own(tmp_path: Path, prefix: str) -> None:
    model = tiny_model(tmp_path / "model", "t2v")
    trained(model, "high", ("q",), tmp_path)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if prefix == "model.diffusion_model.":  # ComfyUI's file in a folder of diffusers
        state = renamed(state, TRANSFORMER)
    save_file({prefix + name: tensor for name, tensor in state.items()}, file)
    lora = ("--lora", lora_path(tmp_path, "high", "diffusers"))
    merged = merge(model, tmp_path / "merged", *lora, "--max-shard-size", "60KB")
    _, report = WanTransformer3DModel.from_pretrained(
        merged / "transformer", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_nothing_is_added_to_fp8(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "t2v")
    trained(model, "high", ("q",), tmp_path)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(
        {
            name: tensor.to(torch.float8_e4m3fn) if name.endswith("to_q.weight") else tensor
            for name, tensor in load_file(file).items()
        },
        file,
    )
    with pytest.raises(UserError, match=r"to_q\.weight as F8_E4M3, to which nothing can be added"):
        merge(model, tmp_path / "out", "--lora", lora_path(tmp_path, "high", "diffusers"))


@pytest.mark.parametrize("fault", ["enospc@3", "kill@4"])
def test_whole_or_not_at_all(fault: str, tiny_t2v: Path, tmp_path: Path) -> None:
    """A full disk, a kill, in the middle of the weights; the next run is not disturbed."""
    trained(tiny_t2v, "high", ("q",), tmp_path)
    arguments = [
        "merge", "--model", str(tiny_t2v), "--output", str(tmp_path / "out"),
        "--lora", str(lora_path(tmp_path, "high", "diffusers")),
    ]  # fmt: skip
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "wantrain"), *arguments],
        env=os.environ | {"WANDISTILL_FAULT": fault}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == (1 if "enospc" in fault else -9), ran.stderr
    assert not (tmp_path / "out").exists()
    if "enospc" in fault:
        assert "Nothing was kept; free some space" in ran.stderr
        assert "Traceback" not in ran.stderr
        assert not (tmp_path / "out.tmp").exists()
    wantrain(arguments, standalone_mode=False)
    WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert not (tmp_path / "out.tmp").exists()
