"""One LoRA in three forms is one LoRA: the same clip, the same first weights, the same files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from tests.train.conftest import randomise_lora
from tests.train.model.test_lora_adapter import provenance
from tests.train.model.test_roles import CPU
from tests.train.sampling.test_sample import sample
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.lora_files import LoraWeights
from train.model.lora_names import Form
from train.model.roles import GENERATOR, Roles
from train.options import Expert
from train.saving.export import lora_path, write_loras
from train.saving.lora_formats import FORMS

# Neither alpha nor alpha / rank is a number of fp32 or bf16; B learns enough to be seen in a clip.
RUN = (
    "--max-train-steps", "1", "--rank", "3", "--network-alpha", "0.7", "--learning-rate", "0.3",
    "--gen-update-interval", "1",
)  # fmt: skip
BOTH: tuple[Expert, Expert] = ("high", "low")


@pytest.fixture(scope="module")
def pair(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs of both experts as `wantrain distill` leaves them at the default targets, in bf16."""
    folder = tmp_path_factory.mktemp("pair")
    for expert in BOTH:
        run = distill(tiny_t2v, t2v_shards, folder / expert, *RUN, "--boundary-type", expert)
        for form in FORMS:
            lora_path(run, expert, form).rename(lora_path(folder, expert, form))
    return folder


def loras(folder: Path, form: Form, experts: Iterable[Expert]) -> list[str]:
    return [word for e in experts for word in ("--lora", str(lora_path(folder, e, form)))]


def clips(model: Path, out: Path, *more: str) -> dict[str, bytes]:
    """File → bytes, of the clip and of the contact sheet."""
    sample(model, out, *more)
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".json"}
    assert {Path(name).suffix for name in found} == {".mp4", ".png"}
    return found


@pytest.mark.parametrize("experts", [BOTH, ("low",)], ids=str)
def test_every_form_gives_the_same_clip_to_the_byte(
    experts: Sequence[Expert], pair: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    more = ("--dtype", "bf16", "--seed", "3")
    expected = clips(tiny_t2v, tmp_path / "a", *loras(pair, "diffusers", experts), *more)
    for form in ("comfyui", "kohya"):
        found = clips(tiny_t2v, tmp_path / form, *loras(pair, form, experts), *more)
        assert found == expected, form
    one = clips(tiny_t2v, tmp_path / "one", *loras(pair, "kohya", ("high",)), *more)
    assert one != expected, "the LoRAs are seen"


def written(model: Path, expert: Expert, layers: tuple[str, ...], folder: Path) -> Path:
    """A LoRA with values everywhere on these layers, in bf16 and in every form; the folder."""
    spec = read_model_spec(model)
    base = load_base(spec, expert, precision="no", device=CPU, gradient_checkpointing=False)
    lora = LoraSpec(rank=3, alpha=0.7, targets=select_targets(base, layers))
    roles = Roles(base, lora, seed=0, names=(GENERATOR,))
    randomise_lora(roles.parameters(GENERATOR), seed=4, scale=0.5)
    weights = LoraWeights.uniform(roles.parameters(GENERATOR), lora.alpha).to(torch.bfloat16)
    changes = {"boundary": None, "flow_shift": 5.0} if expert == "full" else {}
    write_loras(folder, weights, provenance(expert, spec.mode, alpha=0.7, rank=3, **changes))
    return folder


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("i2v", ("q", "k", "v", "o", "ffn.0", "ffn.2")),
        ("i2v", ("cross_attn.k",)),
        ("wan21", ("k_img", "v_img", "o")),
        ("wan21", ("cross_attn.k", "cross_attn.v_img", "ffn.0")),
    ],
    ids=str,
)
def test_on_any_layers_of_i2v(
    kind: str, layers: tuple[str, ...], tiny_i2v: Path, tiny_wan21_i2v: Path, tmp_path: Path
) -> None:
    model, expert = (tiny_i2v, "high") if kind == "i2v" else (tiny_wan21_i2v, "full")
    folder = written(model, expert, layers, tmp_path)  # type: ignore[arg-type]
    picture = np.random.default_rng(0).integers(0, 255, (70, 64, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    more = ("--image", str(tmp_path / "first.png"))
    found = [
        clips(model, tmp_path / form, *loras(folder, form, (expert,)), *more)  # type: ignore[list-item]
        for form in FORMS
    ]
    assert found[0] == found[1] == found[2]
    teacher = clips(model, tmp_path / "t", "--teacher", "--steps", "1", *more)
    assert set(teacher.values()).isdisjoint(found[0].values())


def foreign(path: Path, source: Path, prefix: str) -> Path:
    """A kohya file as musubi-tuner writes it: an alpha beside each pair, nothing of ours."""
    held = {k.replace("lora_unet_", prefix, 1): v for k, v in load_file(source).items()}
    save_file(held, path, {"format": "pt", "ss_network_module": "networks.lora_wan"})
    return path


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__"])
def test_a_kohya_file_of_others_in_every_command(
    prefix: str, pair: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """It leads where the same LoRA leads in diffusers' form."""
    theirs = foreign(tmp_path / "a.safetensors", lora_path(pair, "low", "kohya"), prefix)
    ours = lora_path(pair, "low", "diffusers")
    teacher = ("--teacher", "--steps", "1", "--base-lora")
    one, other = (
        clips(tiny_t2v, tmp_path / path.stem, *teacher, f"{path}:0.9") for path in (theirs, ours)
    )
    assert one == other

    for path in (theirs, ours):
        out = tmp_path / f"merged-{path.stem}"
        which = ("--boundary-type", "low", "--lora-scale", "0.9")
        merged = ("merge", "--model", str(tiny_t2v), "--lora", str(path), "--output", str(out))
        wantrain([*merged, *which], standalone_mode=False)
    weights = [
        load_file(next((tmp_path / f"merged-{p.stem}" / "transformer_2").glob("*.safetensors")))
        for p in (theirs, ours)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    begun = ("--max-train-steps", "1", "--rank", "4", "--boundary-type", "low", "--init-lora")
    runs = [
        distill(tiny_t2v, t2v_shards, tmp_path / f"run-{p.stem}", *begun, str(p))
        for p in (theirs, ours)
    ]
    a, b = (load_file(run / "lora-low-diffusers.safetensors") for run in runs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    with pytest.raises(UserError, match=r"has no training metadata.*--base-lora FILE"):
        sample(tiny_t2v, tmp_path / "refused", "--lora", str(theirs))


def test_export_leads_from_each_form_to_each_to_the_byte(pair: Path, tmp_path: Path) -> None:
    for source in FORMS:
        for form in FORMS:
            to = ("--to", form, "--output", str(tmp_path / "x.safetensors"))
            file = str(lora_path(pair, "low", source))
            wantrain(["export", "--lora", file, *to], standalone_mode=False)
            expected = lora_path(pair, "low", form).read_bytes()
            assert (tmp_path / "x.safetensors").read_bytes() == expected, (source, form)


def test_a_lora_of_a_smaller_model_is_refused_before_weights_are_read(
    pair: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    path = lora_path(pair, "low", "kohya")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    further = {k.replace("blocks_1_", "blocks_7_"): v for k, v in load_file(path).items()}
    save_file(further, tmp_path / "x.safetensors", metadata)
    model = tmp_path / "model"
    model.mkdir()
    for part in tiny_t2v.iterdir():
        if part.name != "text_encoder":
            (model / part.name).symlink_to(part)
    with pytest.raises(UserError, match=r"adapts blocks\.7\.attn1.*\(blocks\.7\.self_attn"):
        sample(model, tmp_path / "out", "--lora", str(tmp_path / "x.safetensors"))
