"""What stands in LoRA files beside the pairs on blocks: whole weights, embeddings, the head.

The reference is the sum in float64 over Wan's own names, as ComfyUI and lightx2v read them: `.diff`
is added to a weight, `.diff_b` to a bias, `.diff_m` to a modulation.
"""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from tests.original_layout import TRANSFORMER, renamed, write_original
from tests.train.model.test_lora_files import original as comfyui_name
from tests.train.model.test_lora_files import tensors_of
from tests.train.saving.test_merge import merge, state_of
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.model.base import Base, load_base
from train.model.lora_files import read_lora

CPU = torch.device("cpu")
RANK, ALPHA = 3, 2.0
State = dict[str, torch.Tensor]
PAIRS = (
    "blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2", "text_embedding.2",
    "time_embedding.0", "time_projection.1", "head.head", "patch_embedding",
)  # fmt: skip
BIASES = (
    "blocks.0.self_attn.q",
    "blocks.1.ffn.0",
    "blocks.0.norm3",
    "head.head",
    "time_embedding.2",
)
WEIGHTS = ("blocks.0.norm3", "blocks.1.self_attn.norm_q", "blocks.1.cross_attn.norm_k", "head.head")
BLOCKS_OF_MODULATION = ("blocks.0", "blocks.1", "head")


def own_names(model: Path) -> State:
    """The high-noise expert by Wan's names."""
    return renamed(load_file(next((model / "transformer").glob("*.safetensors"))), TRANSFORMER)


def lora_and_sum(model: Path, strength: float) -> tuple[State, State]:
    """A LoRA with everything, by Wan's names, and the weights with it added, in float64."""
    base = {name: tensor.double() for name, tensor in own_names(model).items()}
    rng = torch.Generator().manual_seed(5)
    total, lora = dict(base), {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * 0.1

    for layer in PAIRS:
        weight = base[f"{layer}.weight"]
        down, up = random(RANK, *weight.shape[1:]), random(weight.shape[0], RANK)
        if weight.dim() > 2:
            up = up.reshape(*up.shape, *[1] * (weight.dim() - 2))
        lora |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        lora[f"{layer}.alpha"] = torch.tensor(ALPHA)
        product = up.double().flatten(1) @ down.double().flatten(1)
        total[f"{layer}.weight"] = weight + strength * ALPHA / RANK * product.reshape(weight.shape)
    diffs = [(f"{layer}.diff", f"{layer}.weight") for layer in WEIGHTS]
    diffs += [(f"{layer}.diff_b", f"{layer}.bias") for layer in BIASES]
    diffs += [(f"{place}.diff_m", f"{place}.modulation") for place in BLOCKS_OF_MODULATION]
    for key, name in diffs:
        lora[key] = random(*base[name].shape)
        total[name] = total[name] + strength * lora[key].double()
    return lora, total


def written(path: Path, lora: State, prefix: str = "diffusion_model.") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in lora.items()}, path)
    return path


def kohya(name: str) -> str:
    layer, dot, part = name.partition(".lora_") if ".lora_" in name else name.rpartition(".")
    return f"lora_unet_{layer.replace('.', '_')}{dot}{part}"


def assert_sums(found: State, total: State) -> None:
    """fp32 against float64, by diffusers' names."""
    by_own_name = renamed(found, TRANSFORMER)
    assert by_own_name.keys() == total.keys()
    for name, exact in total.items():
        torch.testing.assert_close(by_own_name[name].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", ["comfyui", "kohya"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_all_of_it_is_added(names: str, layout: str, tiny_t2v: Path, tmp_path: Path) -> None:
    lora, total = lora_and_sum(tiny_t2v, -0.7)
    path = written(tmp_path / "comfyui.safetensors", lora)
    if names == "kohya":
        renamed_keys = {kohya(name): tensor for name, tensor in lora.items()}
        path = written(tmp_path / "kohya.safetensors", renamed_keys, prefix="")
    model = tiny_t2v
    if layout == "original":
        model = write_original(tiny_t2v, tmp_path / "original")
    spec, base = read_model_spec(model), Base.parse(None, [f"{path}:-0.7"])
    base.check(spec, "transformer")
    loaded = load_base(
        spec, "high", precision="no", device=CPU, gradient_checkpointing=False, base=base
    )
    assert_sums(loaded.state_dict(), total)
    merged = merge(
        model, tmp_path / "merged", "--lora", path, "--boundary-type", "high",
        "--lora-scale", "-0.7",
    )  # fmt: skip
    if layout == "diffusers":
        assert_sums(state_of(merged / "transformer"), total)
    else:
        found = state_of(merged / "high_noise_model")
        assert found.keys() == total.keys()
        for name, exact in total.items():
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)


def export(*arguments: object) -> None:
    wantrain(["export", *map(str, arguments)], standalone_mode=False)


def test_export_keeps_it_or_leaves_it_out(
    tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, _ = lora_and_sum(tiny_t2v, 1.0)
    path, output = written(tmp_path / "a.safetensors", lora), tmp_path / "b.safetensors"
    export("--lora", path, "--to", "comfyui", "--output", output)
    assert "extras   kept" in capsys.readouterr().out
    found, expected = load_file(output), load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for form in ("kohya", "diffusers"):
        output.unlink()
        with pytest.raises(
            UserError, match=rf"found {form}, which has no place for the 12 .*\.bias"
        ):
            export("--lora", path, "--to", form, "--output", output)
        export("--lora", path, "--to", form, "--output", output, "--drop-extras")
        assert "extras   left out 17: " in capsys.readouterr().out
        read = read_lora(output)
        assert read.lora.modules == [
            "blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.2",
        ]  # fmt: skip
        assert not read.lora.extras
        for own, module in zip(PAIRS, read.lora.modules, strict=False):
            assert torch.equal(
                read.lora.up(module), expected[f"diffusion_model.{own}.lora_up.weight"]
            )
            assert read.lora.alphas[module] == ALPHA


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_pairs_on_embeddings_and_head_are_in_every_form(
    form: str, tiny_t2v: Path, tmp_path: Path
) -> None:
    lora, total = lora_and_sum(tiny_t2v, 1.0)
    pairs = {name: tensor for name, tensor in lora.items() if ".diff" not in name}
    path, output = written(tmp_path / "a.safetensors", pairs), tmp_path / "b.safetensors"
    export("--lora", path, "--to", form, "--output", output)
    one, other = read_lora(path).lora, read_lora(output).lora
    assert one.modules == other.modules and one.alphas == other.alphas
    assert all(torch.equal(other.weights[name], tensor) for name, tensor in one.weights.items())
    if form == "diffusers":
        pipeline = WanPipeline.from_pretrained(tiny_t2v)
        pipeline.load_lora_weights(str(output))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        fused = renamed(dict(pipeline.transformer.state_dict()), TRANSFORMER)
        for layer in PAIRS[:-2]:
            name = f"{layer}.weight"
            torch.testing.assert_close(fused[name].double(), total[name], rtol=1e-4, atol=1e-5)


def test_a_run_cannot_begin_as_it(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", lora_and_sum(tiny_t2v, 1.0)[0])
    message = r"--init-lora: .* changes more than linear layers.*--drop-extras.*--base-lora"
    with pytest.raises(UserError, match=message):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--init-lora", str(path))


def test_what_the_model_has_not_or_otherwise_is_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    spec = read_model_spec(tiny_t2v)
    for key, shape, message in (
        ("blocks.0.cross_attn.norm_k_img.diff", (32,), r"norm_added_k\S* .*which .*does not have"),
        ("img_emb.proj.1.diff_b", (32,), r"image_embedder\S* .*which .*does not have"),
        ("blocks.0.diff_m", (1, 6, 31), r"blocks\.0\.modulation\) as .* \[1, 6, 31\]; .*, 32\]"),
        ("blocks.7.norm3.diff", (32,), r"blocks\.7\.norm2 \(blocks\.7\.norm3\), .*does not have"),
    ):
        path = written(tmp_path / "x.safetensors", {key: torch.ones(*shape)})
        with pytest.raises(UserError, match=message):
            Base.parse(None, [str(path)]).check(spec, "transformer")


def test_differences_of_zeros_add_nothing(tmp_path: Path) -> None:
    """Files hold them for norms that were not trained; every form can do without."""
    pairs = tensors_of(comfyui_name())
    zeros = {"diffusion_model.blocks.0.norm3.diff": torch.zeros(12)}
    save_file(pairs | zeros, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").lora.extras == []
