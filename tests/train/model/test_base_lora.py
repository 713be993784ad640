"""`--base-lora`: what is merged, against float64 and against diffusers' use of it."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from shared.models.wan import WAN
from tests.original_layout import write_original
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.sampling.test_sample import frames, sample
from tests.train.test_distill import distill, final_bytes
from train.model.base import Base, base_digest, load_base
from train.model.lora_source import ScaledLora
from train.saving.export import lora_path
from train.saving.provenance import read_provenance

CPU = torch.device("cpu")
SCALE = 1.0 / 4  # alpha / rank of tests.train.model.test_lora_adapter.trained
FORMS = ("diffusers", "comfyui", "kohya")
RUN = ("--max-train-steps", "1", "--mixed-precision", "no")


def _kohya(weights: dict[str, torch.Tensor], path: Path) -> Path:
    tensors = {}
    for name, tensor in weights.items():
        _, block, *module, matrix, _ = name.split(".")
        original = WAN.original_layers[".".join(module)].replace(".", "_")
        stem = f"lora_unet_blocks_{block}_{original}"
        tensors[f"{stem}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def style(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LoRA of the low expert, alpha 1 at rank 4, in every form."""
    folder = tmp_path_factory.mktemp("style")
    trained(tiny_t2v, "low", ALL, folder)
    files = {form: lora_path(folder, "low", form) for form in ("diffusers", "comfyui")}
    state = load_file(files["diffusers"])
    weights = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    return files | {"kohya": _kohya(weights, folder / "kohya.safetensors")}


def based(model: Path, precision: str, *merged: ScaledLora) -> torch.nn.Module:
    return load_base(
        read_model_spec(model), "low", precision=precision, device=CPU,  # type: ignore[arg-type]
        gradient_checkpointing=False, base=Base(merged=merged),
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_weights_are_those_of_float64(
    form: str, layout: str, style: dict[str, Path], tiny_t2v: Path, tmp_path: Path
) -> None:
    model = tiny_t2v
    if layout == "original":
        model = write_original(tiny_t2v, tmp_path / "original")
    ab = {n.removeprefix("transformer."): t for n, t in load_file(style["diffusers"]).items()}
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        plain = based(tiny_t2v, precision).state_dict()
        found = based(model, precision, ScaledLora(path=style[form], strength=-0.7)).state_dict()
        changed = 0
        for name, tensor in plain.items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" not in ab:
                assert torch.equal(found[name], tensor), name
                continue
            down, up = (ab[f"{module}.lora_{part}.weight"].double() for part in "AB")
            exact = tensor.double() - 0.7 * SCALE * (up @ down)
            assert found[name].dtype == dtype
            # Half a spacing of the dtype, and what fp32 sums lose.
            error = (found[name].double() - exact).abs()
            assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 5e-7).all(), name
            changed += 1
        assert changed == 2 * 10


def test_two_in_a_row_are_what_diffusers_applies(
    style: dict[str, Path], tiny_t2v: Path, tmp_path: Path
) -> None:
    trained(tiny_t2v, "high", ("q", "ffn.2"), tmp_path)  # other weights, fewer layers
    second = lora_path(tmp_path, "high", "comfyui")
    base = based(
        tiny_t2v, "no", ScaledLora(path=style["kohya"], strength=0.5), ScaledLora(path=second)
    )
    pipeline = WanPipeline.from_pretrained(tiny_t2v)
    for name, path in (("one", style["diffusers"]), ("two", second)):
        pipeline.load_lora_weights(str(path), adapter_name=name, load_into_transformer_2=True)
    pipeline.transformer_2.set_adapters(["one", "two"], [0.5, 1.0])
    rng = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 16, 3, 4, 6, generator=rng)
    text, t = torch.randn(2, 512, 32, generator=rng), torch.tensor([937.5, 300.0])
    with torch.no_grad():
        expected = pipeline.transformer_2(inputs, t, text, return_dict=False)[0]
        found = base(inputs, t, text, return_dict=False)[0]
        plain = based(tiny_t2v, "no")(inputs, t, text, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 0.01


def test_the_digest_knows_file_strength_and_order(
    style: dict[str, Path], tiny_t2v: Path, tmp_path: Path
) -> None:
    def digest(*merged: ScaledLora) -> str:
        return base_digest(tiny_t2v, "transformer_2", Base(merged=merged))

    one = ScaledLora(path=style["diffusers"])
    two = ScaledLora(path=style["kohya"], strength=0.5)
    shutil.copy(style["diffusers"], tmp_path / "renamed.safetensors")
    assert digest(one) == digest(ScaledLora(path=tmp_path / "renamed.safetensors"))
    different = [
        digest(), digest(one), digest(ScaledLora(path=one.path, strength=0.9)), digest(two),
        digest(one, two), digest(two, one),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert digest() == base_digest(tiny_t2v, "transformer_2")


def _merged_model(style: Path, strength: float, model: Path, folder: Path) -> Path:
    """The model with the merged weights in place of its low expert's."""
    shutil.copytree(model, folder)
    state = based(model, "no", ScaledLora(path=style, strength=strength)).state_dict()
    weights = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    return folder


def test_a_run_on_it_equals_one_on_merged_weights_and_is_sampled_on_them(
    style: dict[str, Path], tiny_t2v: Path, t2v_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    option = ("--base-lora", f"{style['comfyui']}:0.6")
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN, *option)
    said = " ".join(capsys.readouterr().err.split())
    assert f"base {style['comfyui']} x 0.6 merged in" in said
    model = _merged_model(style["comfyui"], 0.6, tiny_t2v, tmp_path / "model")
    same = distill(model, t2v_shards, tmp_path / "same", *RUN)
    plain = distill(tiny_t2v, t2v_shards, tmp_path / "plain", *RUN)
    name = "checkpoint-1/critic_weights.safetensors"
    expected, ordinary = load_file(same / name), load_file(plain / name)
    for key, tensor in load_file(out / name).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)
    assert any((expected[key] - ordinary[key]).abs().max() > 1e-4 for key in expected)

    lora = ("--lora", str(out / "lora-low-diffusers.safetensors"))
    told = read_provenance(Path(lora[1])).recipe["base"]
    assert told == f"{style['comfyui'].name} x 0.6 merged in"
    assert told in (out / "workflow-comfyui.json").read_text()
    capsys.readouterr()
    clips = [
        sample(*arguments) / "student-000.mp4"
        for arguments in (
            (tiny_t2v, tmp_path / "1", *lora, *option),
            (model, tmp_path / "2", *lora),
            (tiny_t2v, tmp_path / "3", *lora),
        )
    ]
    own, merged, without = (frames(clip).astype(int) for clip in clips)
    assert abs(own - merged).mean() < 0.1 < abs(own - without).mean()
    warned = capsys.readouterr().err
    assert warned.count("was trained on other weights") == 2  # of 2 and 3; 1 has the same digest
    assert f"{style['comfyui']} x 0.6 merged in" in " ".join(warned.split())


def test_resuming_with_another_strength_is_refused(
    style: dict[str, Path], tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    def go(lora: str, *more: str) -> Path:
        merged = ("--base-lora", f"{style['diffusers']}{lora}")
        return distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN[2:], *merged, *more)

    before = final_bytes(go("", "--max-train-steps", "1"))
    resume = ("--max-train-steps", "2", "--resume-from-checkpoint", "latest")
    with pytest.raises(
        UserError, match=r"base_lora: checkpoint has \['\w{12} x 1'\], this run \['\w{12} x 0\.5'\]"
    ):
        go(":0.5", *resume)
    assert final_bytes(go(":1.0", *resume)) != before


def test_what_does_not_fit_is_refused_before_anything_is_written(
    style: dict[str, Path], tiny_t2v: Path, tiny_i2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    def refused(value: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            distill(tiny_t2v, t2v_shards, tmp_path / "out", "--base-lora", value)
        assert not (tmp_path / "out").exists()

    refused(f"{style['kohya']}:strong", r"--base-lora: found '.*:strong', expected FILE or FILE:X")
    refused(f"{style['kohya']}:0", "a number other than 0")
    refused(str(tmp_path / "lost.safetensors"), "there is no such file")
    wide = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 64),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(64, 4),
    }
    save_file(wide, tmp_path / "wide.safetensors")
    refused(str(tmp_path / "wide.safetensors"), r"of shape \[64, 64\]; the transformer_2 of")
    image = {
        "blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(4, 32),
        "blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(32, 4),
    }
    save_file(image, tmp_path / "image.safetensors")
    refused(str(tmp_path / "image.safetensors"), r"cross_attn\.k_img.*does not have")


def test_a_file_without_alpha_is_told_of(
    style: dict[str, Path], tiny_t2v: Path, t2v_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    state = {n: t for n, t in load_file(style["comfyui"]).items() if not n.endswith(".alpha")}
    save_file(state, tmp_path / "bare.safetensors")
    option = ("--base-lora", str(tmp_path / "bare.safetensors"))
    distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN, *option)
    assert "has no alpha; alpha = rank is assumed" in " ".join(capsys.readouterr().err.split())
