"""`--transformer-path`: own weights in every form that Wan transformers come in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from tests.models import tiny_model, tiny_transformer
from tests.original_layout import TRANSFORMER, renamed, write_original
from tests.train.sampling.test_sample import frames, sample
from tests.train.test_distill import distill, final_bytes
from train.model.base import Base, base_digest, load_base
from train.saving.provenance import read_provenance

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same form with other weights: somebody's finetuned one."""
    return tiny_model(tmp_path_factory.mktemp("finetuned") / "model", "t2v", seed=9)


def original_names(model: Path, prefix: str = "") -> State:
    state = load_file(model / "transformer_2" / FILE)
    return {prefix + name: tensor for name, tensor in renamed(state, TRANSFORMER).items()}


def low(model: Path, own: Path | None, precision: str = "no") -> torch.nn.Module:
    return load_base(
        read_model_spec(model), "low", precision=precision, device=CPU,  # type: ignore[arg-type]
        gradient_checkpointing=False, base=Base(own=own),
    )  # fmt: skip


def _sharded(other: Path, folder: Path) -> Path:
    model = WanTransformer3DModel.from_pretrained(other / "transformer_2")
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    # Another variant of the same weights beside them, as repositories have it.
    save_file({"stale": torch.ones(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    return folder


def _file(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _all_in_one(other: Path, folder: Path) -> Path:
    rest = {"vae.decoder.conv1.weight": torch.ones(2), "text_encoders.x.weight": torch.ones(2)}
    return _file(original_names(other, "model.diffusion_model.") | rest, folder / "aio.safetensors")


def _trainers_output(other: Path, folder: Path) -> Path:
    shutil.copytree(other / "transformer_2", folder / "transformer")
    return folder


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "model": lambda other, folder: other,
    "transformer": lambda other, folder: other / "transformer_2",
    "shards": lambda other, folder: _sharded(other, folder),
    "index": lambda other, folder: _sharded(other, folder) / f"{FILE}.index.json",
    "trainer": _trainers_output,
    "wrappers": lambda other, folder: _file(
        original_names(other, "net.module._orig_mod."), folder / "x.safetensors"
    ),
    "original model": lambda other, folder: write_original(other, folder / "original"),
    "original expert": lambda other, folder: (
        write_original(other, folder / "original", prefix="model.diffusion_model.")
        / "low_noise_model"
    ),
    "diffusers file": lambda other, folder: other / "transformer_2" / FILE,
    "original file": lambda other, folder: _file(original_names(other), folder / "x.safetensors"),
    "comfyui file": lambda other, folder: _file(
        original_names(other, "model.diffusion_model."), folder / "x.safetensors"
    ),
    "short prefix": lambda other, folder: _file(
        original_names(other, "diffusion_model."), folder / "x.safetensors"
    ),
    "all in one": _all_in_one,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_transformer(
    form: str, other: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    path = FORMS[form](other, tmp_path)
    for precision in ("no", "bf16"):
        expected = low(other, None, precision).state_dict()
        found = low(tiny_t2v, path, precision).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert base_digest(tiny_t2v, "transformer_2", Base(own=path)) == base_digest(
        other, "transformer_2"
    )
    assert base_digest(other, "transformer_2") != base_digest(tiny_t2v, "transformer_2")


def in_8_bits(state: State, style: str) -> tuple[State, State]:
    """(what such a file holds, float64 weights it stands for). Linear layers of blocks are fp8."""
    held: State = {}
    meant: State = {}
    for name, tensor in state.items():
        if not (name.endswith(".weight") and ".blocks." in "." + name and tensor.ndim == 2):
            held[name] = tensor.half()
            meant[name] = held[name].double()
            continue
        layer = name.removesuffix(".weight")
        kind = torch.float8_e5m2 if style == "plain e5m2" else torch.float8_e4m3fn
        if style.startswith("plain"):
            held[name], scale = tensor.to(kind), torch.ones(())
        else:
            largest = tensor.abs().amax(1, keepdim=True) if style == "rows" else tensor.abs().max()
            scale = (largest / 448).float()
            held[name] = (tensor / scale).to(kind)
            if style == "old":
                held[f"{layer}.scale_weight"] = scale.reshape(1)
                held[f"{layer}.scale_input"] = torch.tensor([0.5])
            else:
                held[f"{layer}.weight_scale"] = scale
                held[f"{layer}.input_scale"] = torch.tensor(0.5)
                told = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
                held[f"{layer}.comfy_quant"] = torch.frombuffer(
                    bytearray(json.dumps(told).encode()), dtype=torch.uint8
                )
        meant[name] = held[name].double() * scale.double()
    if style == "old":
        held["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return held, meant


@pytest.mark.parametrize("style", ["plain", "plain e5m2", "old", "new", "rows"])
def test_fp8_files_stand_for_their_weights(
    style: str, other: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    """Against float64 values, and a transformer that diffusers' class was given them in."""
    held, meant = in_8_bits(original_names(other), style)
    path = _file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in held.items()},
        tmp_path / "fp8.safetensors",
    )
    base = low(tiny_t2v, path)
    reference = WanTransformer3DModel.from_pretrained(other / "transformer_2")
    back = dict(zip(original_names(other), load_file(other / "transformer_2" / FILE), strict=True))
    exact = {back[name]: tensor for name, tensor in meant.items()}
    reference.load_state_dict({name: tensor.float() for name, tensor in exact.items()})

    rng = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 16, 3, 4, 6, generator=rng)
    text, t = torch.randn(2, 512, 32, generator=rng), torch.tensor([937.5, 300.0])
    with torch.no_grad():
        expected = reference(inputs, t, text, return_dict=False)[0]
        found = base(inputs, t, text, return_dict=False)[0]
        untouched = low(other, None)(inputs, t, text, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (untouched - expected).abs().max() > 1e-3  # rounding to 8 bits shows
    half = low(tiny_t2v, path, "bf16").state_dict()
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, tensor in exact.items():
        wanted = torch.float32 if set(kept) & set(name.split(".")) else torch.bfloat16
        assert half[name].dtype == wanted, name
        # One rounding of fp32 and one of bf16, of which the first hardly ever shows.
        spacing = torch.finfo(wanted).eps * tensor.abs()
        assert ((half[name].double() - tensor).abs() <= 0.5001 * spacing).all(), name
        assert torch.equal(base.state_dict()[name], tensor.float()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(
    dtype: torch.dtype, other: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in original_names(other).items()}
    found = low(tiny_t2v, _file(state, tmp_path / "x.safetensors"), "bf16").state_dict()
    assert torch.equal(
        found["blocks.1.ffn.net.2.weight"], state["blocks.1.ffn.2.weight"].to(torch.bfloat16)
    )
    assert torch.equal(found["proj_out.weight"], state["head.head.weight"].to(torch.bfloat16))
    assert found["blocks.0.norm2.weight"].dtype == torch.float32


WEIGHT = "blocks.1.self_attn.q.weight"
LAYER = WEIGHT.removesuffix(".weight")


def _as_bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({WEIGHT: torch.ones(32, 32, dtype=torch.int8)}, r"self_attn\.q\.weight is int8"),
        ({WEIGHT: torch.ones(32, 16, dtype=torch.uint8)}, r"self_attn\.q\.weight is uint8"),
        (
            {f"{LAYER}.comfy_quant": _as_bytes({"format": "nvfp4"})},
            r"self_attn\.q is nvfp4\. Expected fp32",
        ),
        (
            {f"{LAYER}.comfy_quant": _as_bytes({"format": "float8_e4m3fn", "convrot": True})},
            r"attn\.q is float8_e4m3fn with convrot",
        ),
        (
            {f"{LAYER}.comfy_quant": torch.ones(3, dtype=torch.uint8)},
            r"marks .*self_attn\.q with a format that can't be read",
        ),
        (
            {f"{LAYER}.scale_weight": torch.ones(32, 4, 1)},
            r"the scale of .*self_attn\.q\.weight \(\[32, 32\]\) has shape \[32, 4, 1\] in float32",
        ),
        ({f"{LAYER}.weight_scale": torch.ones(1, dtype=torch.uint8)}, r"has shape \[1\] in uint8"),
        ({f"{LAYER}x.weight_scale": torch.ones(1)}, r"a scale for .*qx\.weight, but not that w"),
        ({f"{LAYER}.weight_scale_2": torch.ones(1)}, r"1 weights too many, the first .*scale_2"),
        ({WEIGHT: torch.ones(48, 32)}, r"has shape \[48, 32\], expected \[32, 32\].*set --model"),
        ({WEIGHT: None}, r"lacks 1 weights, the first blocks\.1\.attn1\.to_q\.weight\. Expected a"),
        ({"patch_embedding.weight": torch.ones(32, 36, 1, 2, 2)}, r"\[32, 36, 1, 2, 2\], expected"),
    ],
)
def test_what_is_not_understood_is_named(
    change: dict[str, torch.Tensor | None], message: str, other: Path, tiny_t2v: Path,
    t2v_shards: Path, tmp_path: Path,
) -> None:  # fmt: skip
    state = {n: t for n, t in (original_names(other) | change).items() if t is not None}
    path = _file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--transformer-path", str(path))
    assert str(path) in str(refused.value)
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_paths_that_hold_no_transformer(
    other: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            distill(tiny_t2v, t2v_shards, tmp_path / "out", "--transformer-path", str(path))

    torch.save(original_names(other), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "it is pickled")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", r"a \.gguf is not read\. Expected a \.safetensors file")
    refused(tmp_path / "lost", r"there is no .*lost")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no safetensors in .*empty")
    (tmp_path / "cut.safetensors").write_bytes((other / "transformer_2" / FILE).read_bytes()[:999])
    refused(tmp_path / "cut.safetensors", r"cannot read .*cut\.safetensors")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    lora = {"blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 32)}
    _file(lora, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "is a LoRA.*--base-lora .*--init-lora")
    shards = _sharded(other, tmp_path / "shards")
    second = sorted(shards.glob("*-of-*"))[1]
    second.unlink()
    for path in (shards, shards / f"{FILE}.index.json"):
        refused(path, rf"index\.json names {second.name}, which is not in its folder")

    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        _file(original_names(other), tmp_path / "two" / f"{name}.safetensors")
    refused(tmp_path / "two", r"has .* twice, in b\.safetensors too.*--transformer-path .*b\.safe")


def test_a_config_that_contradicts_the_models_is_refused(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Of four heads or two no weight's shape tells."""
    model = tiny_transformer("t2v", num_attention_heads=4, attention_head_dim=8)
    model.save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match=r"num_attention_heads=4|attention_head_dim=8.*16") as said:
        distill(
            tiny_t2v, t2v_shards, tmp_path / "out", "--transformer-path", str(tmp_path / "four"),
            "--dry-run",
        )  # fmt: skip
    assert "the transformer_2 of" in str(said.value)


@pytest.fixture(scope="module")
def fp8(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    held, _ = in_8_bits(original_names(other, "model.diffusion_model."), "old")
    return _file(held, tmp_path_factory.mktemp("fp8") / "own.safetensors")


RUN = ("--max-train-steps", "1", "--mixed-precision", "no")


@pytest.fixture(scope="module")
def student(
    fp8: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Distilled from the scaled fp8 file."""
    out = tmp_path_factory.mktemp("student") / "out"
    return distill(tiny_t2v, t2v_shards, out, *RUN, "--transformer-path", str(fp8))


def _model_with(fp8: Path, model: Path, folder: Path) -> Path:
    """The model with these weights in place of its low expert's."""
    shutil.copytree(model, folder)
    weights = folder / "transformer_2" / FILE
    state = low(model, fp8).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    return folder


def test_a_run_on_it_equals_one_on_a_model_that_holds_it(
    fp8: Path, student: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    model = _model_with(fp8, tiny_t2v, tmp_path / "model")
    same = distill(model, t2v_shards, tmp_path / "same", *RUN)
    plain = distill(tiny_t2v, t2v_shards, tmp_path / "plain", *RUN)
    for file in (student / "checkpoint-1").glob("*_weights.safetensors"):
        expected = load_file(same / "checkpoint-1" / file.name)
        ordinary = load_file(plain / "checkpoint-1" / file.name)
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
        assert any(not torch.equal(t, ordinary[n]) for n, t in expected.items())
    told = read_provenance(student / "lora-low-diffusers.safetensors")
    assert told.base == base_digest(tiny_t2v, "transformer_2", Base(own=fp8))
    assert told.base != base_digest(tiny_t2v, "transformer_2")
    assert told.recipe["base"] == f"weights of {fp8.name} in place of the model's"


def test_resuming_on_another_base_is_refused(
    fp8: Path, student: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(student, tmp_path / "out")
    resume = (*RUN[2:], "--max-train-steps", "2", "--resume-from-checkpoint", "latest")
    expected = base_digest(tiny_t2v, "transformer_2", Base(own=fp8))
    found = base_digest(tiny_t2v, "transformer_2")
    with pytest.raises(
        UserError, match=rf"model\.base: checkpoint has '{expected}', this run '{found}'"
    ):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *resume)
    distill(tiny_t2v, t2v_shards, tmp_path / "out", *resume, "--transformer-path", str(fp8))
    assert final_bytes(tmp_path / "out") != final_bytes(student)


def test_the_student_is_sampled_on_its_base(
    fp8: Path, student: Path, tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ("--lora", str(student / "lora-low-diffusers.safetensors"))
    own = sample(tiny_t2v, tmp_path / "own", *lora, "--transformer-path", str(fp8))
    said = " ".join(capsys.readouterr().err.split())
    assert "base transformer_2: weights of" in said and "trained on other weights" not in said
    model = _model_with(fp8, tiny_t2v, tmp_path / "model")
    same = sample(model, tmp_path / "same", *lora)
    apart = frames(own / "student-000.mp4").astype(int) - frames(same / "student-000.mp4")
    assert abs(apart).mean() < 0.1
    capsys.readouterr()
    without = sample(tiny_t2v, tmp_path / "without", *lora)
    said = " ".join(capsys.readouterr().err.split())
    assert "was trained on other weights" in said and f"trained on: weights of {fp8.name}" in said
    other = frames(own / "student-000.mp4").astype(int) - frames(without / "student-000.mp4")
    assert abs(other).mean() > 10 * abs(apart).mean()


def test_high_weights_of_a_model_with_one_transformer(tiny_ti2v: Path, tmp_path: Path) -> None:
    own = str(tiny_ti2v / "transformer")
    size = ("--height", "64", "--width", "96", "--teacher", "--steps", "2")
    with pytest.raises(UserError, match=r"one transformer runs every step here\. Leave out"):
        sample(tiny_ti2v, tmp_path, *size, "--transformer-high-path", own)
    one = sample(tiny_ti2v, tmp_path / "1", *size, "--transformer-path", own)
    two = sample(tiny_ti2v, tmp_path / "2", *size)
    apart = frames(one / "teacher-000.mp4").astype(int) - frames(two / "teacher-000.mp4")
    assert abs(apart).mean() < 0.1


def test_each_expert_has_its_own(other: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    """The teacher made of both of the other model's experts, each from its own path."""
    paths = (
        "--transformer-path", str(other / "transformer_2"),
        "--transformer-high-path", str(other / "transformer"),
    )  # fmt: skip
    more = ("--teacher", "--steps", "3")
    own = frames(sample(tiny_t2v, tmp_path / "own", *more, *paths) / "teacher-000.mp4")
    whole = frames(
        sample(_encoders_of(tiny_t2v, other, tmp_path / "m"), tmp_path / "w", *more)
        / "teacher-000.mp4"
    )
    plain = frames(sample(tiny_t2v, tmp_path / "plain", *more) / "teacher-000.mp4")
    assert abs(own.astype(int) - whole).mean() < 0.1 < abs(own.astype(int) - plain).mean()


def _encoders_of(encoders: Path, transformers: Path, folder: Path) -> Path:
    shutil.copytree(encoders, folder)
    for name in ("transformer", "transformer_2"):
        shutil.rmtree(folder / name)
        shutil.copytree(transformers / name, folder / name)
    return folder
