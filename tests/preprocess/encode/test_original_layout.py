"""The same weights in Wan's original layout and in diffusers': the same cache, to the byte."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from shared.format.fingerprint import model_fields
from shared.io.hashing import FileHasher
from shared.models.digest import component_digest
from shared.models.original_layout import vae_config
from shared.models.spec import ModelSpec, read_model_spec
from tests.models import Mode, tiny_model
from tests.original_layout import write_original
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep

VAE, TEXT = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def published_form(mode: Mode, scratch: Path) -> AutoencoderKLWan:
    """The published VAE of a family, with few channels: what the original layout can hold."""
    if mode != "ti2v":
        return AutoencoderKLWan(base_dim=4)
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "config.json").write_text(json.dumps({"_class_name": "WanModel", "out_dim": 48}))
    return AutoencoderKLWan.from_config(
        {**vae_config(scratch), "base_dim": 4, "decoder_base_dim": 8}
    )


def both(mode: Mode, folder: Path, **options: Any) -> tuple[Path, Path]:
    """One model in diffusers' and in the original layout."""
    two = mode in ("t2v", "i2v")
    torch.manual_seed(7)
    vae = published_form(mode, folder / "scratch")
    model = tiny_model(folder / "diffusers", mode, two_experts=two, vae=vae, rope_max_seq_len=1024)
    return model, write_original(model, folder / "original", **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    render_clip(folder / "wide.mp4", height=72, width=128, frames=9)
    (folder / "wide.txt").write_text("a clip in two layouts")
    return folder


def encode(model: Path, data: Path, output: Path, *more: object) -> Ran:
    return wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--output", output),
        *("--size", 96, "--video-sample-stride", 1, "--video-sample-n-frames", 5),
        *("--device", "cpu", *more),
    )


def facts(spec: ModelSpec) -> dict[str, object]:
    return {name: value for name, value in spec.__dict__.items() if name != "folder"}


@pytest.mark.parametrize(
    "mode", ["t2v", "i2v", "ti2v", "wan21-i2v", pytest.param("wan21-flf2v", marks=pytest.mark.long)]
)
def test_both_layouts_give_the_same_cache(mode: Mode, data: Path, tmp_path: Path) -> None:
    model, original = both(mode, tmp_path)
    assert facts(read_model_spec(original)) == facts(read_model_spec(model))

    one, two = tmp_path / "one", tmp_path / "two"
    for folder, output in ((model, one), (original, two)):
        ran = encode(folder, data, output, "--text-encoder-dtype", "bf16")
        assert ran.code == 0, ran.err
    contents = Cache.open(one).contents()
    assert contents == Cache.open(two).contents() and len(contents) >= 4
    fingerprints = [
        json.loads((o / "manifest.json").read_text())["fingerprint"] for o in (one, two)
    ]
    assert fingerprints[0] == fingerprints[1]

    ran = encode(original, data, one)  # a cache of the one is one of the other
    assert ran.code == 0 and "1 in the shards, 0 to encode" in ran.err


def test_a_digest_is_of_values(tmp_path: Path) -> None:
    """Cut into files or written out in fp32, the same bf16 weights are the same encoder."""
    model = tiny_model(tmp_path / "model", "t2v", two_experts=False, dtype=torch.bfloat16)
    hasher = FileHasher(tmp_path / "memo")
    before = component_digest(model, "text_encoder", hasher)
    file = model / "text_encoder/model.safetensors"
    state = load_file(file)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    names = sorted(state)
    file.unlink()
    for number, part in enumerate((names[:3], names[3:])):
        wide = {name: state[name].float() for name in part}
        save_file(wide, file.with_name(f"model-{number}.safetensors"))
    assert component_digest(model, "text_encoder", hasher) == before
    state[names[0]].view(-1)[0] *= 2
    save_file({name: state[name] for name in names[:3]}, file.with_name("model-0.safetensors"))
    assert component_digest(model, "text_encoder", hasher) != before


def test_a_training_machine_needs_no_encoders(tmp_path: Path) -> None:
    model, original = both("i2v", tmp_path)
    for name in (VAE, TEXT):
        (original / name).unlink()
    shutil.rmtree(original / "google")
    spec = read_model_spec(original)
    assert facts(spec) == facts(read_model_spec(model))
    fields = model_fields(spec, FileHasher(tmp_path / "memo"))
    assert fields["latents"]["vae"] is fields["text"]["encoder"] is None


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def config(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of a file was run",))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vae": (lambda m: (m / VAE).unlink(), "vae holds no weights"),
    "cut vae": (
        lambda m: (m / VAE).write_bytes((m / VAE).read_bytes()[:5000]),
        f"cannot read {{}}/{VAE}",
    ),
    "vae lacks": (
        lambda m: rewrite(m / VAE, lambda s: s.pop("conv1.bias")),
        "lacks 1 weights, the first quant_conv.bias",
    ),
    "vae has more": (
        lambda m: rewrite(m / VAE, lambda s: s.update(extra=torch.ones(1))),
        "1 weights too many, the first extra",
    ),
    "vae of another shape": (
        lambda m: rewrite(m / VAE, lambda s: s.update({"conv2.bias": torch.ones(3)})),
        "post_quant_conv.bias has shape [3], expected [16]",
    ),
    "text encoder as vae": (
        lambda m: shutil.copy(m / TEXT, m / VAE),
        f"{VAE} has no weights of a vae",
    ),
    "hostile": (
        lambda m: (m / TEXT).write_bytes(pickle.dumps({"token_embedding.weight": Hostile()})),
        "wandistill runs no code of a file",
    ),
    "hostile zip": (lambda m: torch.save(Hostile(), m / TEXT), "wandistill runs no code of a file"),
    "not tensors": (lambda m: torch.save([1, 2], m / TEXT), "something else than tensors by name"),
    "vace": (lambda m: config(m / "config.json", model_type="vace"), "model_type='vace'"),
    "cut config": (lambda m: (m / "config.json").write_text("{"), "neither a model_index.json"),
    "other channels": (lambda m: config(m / "config.json", out_dim=20), "out_dim=20"),
    "no field": (lambda m: config(m / "config.json", dim=None), "lack or misspell a field"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "google"), "tokenizer holds no weights"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_model(folder / "model", "t2v", two_experts=False, vae=AutoencoderKLWan(base_dim=4))
    return write_original(model, folder / "original")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_named(
    damage: str, data: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    do, message = DAMAGES[damage]
    do(model)
    ran = encode(model, data, tmp_path / "shards")
    assert ran.code == 1, ran.out
    assert message.format(model) in ran.err and str(model) in ran.err
    assert "Traceback" not in ran.err
    assert "code of a file was run" not in ran.out + ran.err + capfd.readouterr().out
