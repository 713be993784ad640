"""LoRA files loaded back by diffusers: the pipeline's transformer equals the trained module."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from tests.original_layout import TRANSFORMER, renamed
from tests.train.conftest import randomise_lora
from tests.train.model.test_roles import CPU, build_batch
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.lora_files import LoraWeights, read_lora
from train.model.lora_names import Form
from train.model.roles import GENERATOR, Roles
from train.options import Expert
from train.saving.export import lora_path, write_loras
from train.saving.lora_formats import FORMS
from train.saving.provenance import Provenance, read_provenance

ALL = ("q", "k", "v", "o", "ffn.0", "ffn.2")
EXPERTS: tuple[tuple[Expert, str], ...] = (("high", "transformer"), ("low", "transformer_2"))


def provenance(expert: Expert, mode: str, **changes: object) -> Provenance:
    values = {
        "method": "distill",
        "expert": expert,
        "mode": mode,
        "denoising_step_indices_list": (1000.0, 750.0, 500.0, 250.0),
        "flow_shift": 5.0 if mode == "i2v" else 12.0,
        "boundary": 0.9 if mode == "i2v" else 0.875,
        "pairing": "renoise",
        "base": "",
        "cache": {"samples": 3, "buckets": [[64, 96, 9], [96, 64, 9]]},
        "rank": 4,
        "alpha": 1.0,
        "updates": 1,
        "recipe": {},
    }
    return Provenance(**(values | changes))  # type: ignore[arg-type]


def trained(
    model: Path, expert: Expert, targets: tuple[str, ...], folder: Path, **changes: object
) -> Roles:
    """Roles with a random generator LoRA of rank 4, alpha 1, written to `folder` in every form."""
    spec = read_model_spec(model)
    base = load_base(spec, expert, precision="no", device=CPU, gradient_checkpointing=False)
    lora = LoraSpec(rank=4, alpha=1, targets=select_targets(base, targets))
    roles = Roles(base, lora, seed=0)
    randomise_lora(roles.parameters(GENERATOR), seed=len(expert), scale=0.4)
    told = provenance(expert, **{"mode": spec.mode} | changes)  # type: ignore[arg-type]
    weights = LoraWeights.uniform(roles.parameters(GENERATOR), lora.alpha)
    write_loras(folder, weights.to(torch.float32), told)
    return roles


SOME = [("q", "k", "v", "ffn.0", "ffn.2"), ("q", "o"), ALL]


def outputs(roles: Roles, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the trained module and the base alone make of `build_batch`."""
    batch, t = build_batch(mode), torch.tensor([937.5, 300.0])
    with torch.no_grad():
        with roles.generator():
            trained = roles.velocity(batch.latents, t, batch.text, batch.condition)
        with roles.teacher():
            base = roles.velocity(batch.latents, t, batch.text, batch.condition)
    assert (trained - base).norm() / base.norm() > 0.01
    return trained, base


def applied(transformer: torch.nn.Module, mode: str) -> torch.Tensor:
    """What a transformer of diffusers makes of `build_batch`, in its own dtype."""
    batch, t = build_batch(mode), torch.tensor([937.5, 300.0])
    parts = [batch.latents] if batch.condition is None else [batch.latents, batch.condition]
    dtype = next(transformer.parameters()).dtype
    with torch.no_grad():
        found: torch.Tensor = transformer(
            torch.cat(parts, dim=1).to(dtype), t, batch.text.to(dtype), return_dict=False
        )[0]
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", SOME, ids=str)
@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_diffusers_applies_what_was_trained(
    mode: str, targets: tuple[str, ...], form: Form, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    model = tiny_i2v if mode == "i2v" else tiny_t2v
    kind = WanImageToVideoPipeline if mode == "i2v" else WanPipeline
    pipeline = kind.from_pretrained(model)
    for expert, component in EXPERTS:
        roles = trained(model, expert, targets, tmp_path)
        file = str(lora_path(tmp_path, expert, form))
        if form == "kohya" and targets != ALL:  # what diffusers' reader of this form insists on
            with pytest.raises(KeyError):
                pipeline.load_lora_weights(file)
            continue
        pipeline.load_lora_weights(
            file, adapter_name=expert, load_into_transformer_2=expert == "low"
        )
        found = applied(getattr(pipeline, component), mode)
        assert torch.allclose(found, outputs(roles, mode)[0], rtol=1e-4, atol=1e-5), (expert, form)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
@pytest.mark.parametrize("targets", SOME, ids=str)
@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_comfyuis_rule_gives_what_was_trained(
    mode: str, targets: tuple[str, ...], form: Form, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    """W += (alpha / rank)·up·down in float64, modules found by name as ComfyUI finds them."""
    model = tiny_i2v if mode == "i2v" else tiny_t2v
    for expert, component in EXPERTS:
        roles = trained(model, expert, targets, tmp_path)
        transformer = WanTransformer3DModel.from_pretrained(model, subfolder=component).double()
        by_key = {}
        for name, weight in renamed(transformer.state_dict(), TRANSFORMER).items():
            if name.endswith(".weight"):
                stem = name.removesuffix(".weight")
                by_key["diffusion_model." + stem] = weight
                by_key["lora_unet_" + stem.replace(".", "_")] = weight
        file = load_file(lora_path(tmp_path, expert, form))
        unused = set(file)
        for stem, weight in by_key.items():
            if f"{stem}.lora_up.weight" in file:
                keys = [
                    f"{stem}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")
                ]
                up, down, alpha = (file[key].double() for key in keys)
                weight += alpha / down.shape[0] * up @ down
                unused -= set(keys)
        assert not unused
        found = applied(transformer, mode).float()
        assert torch.allclose(found, outputs(roles, mode)[0], rtol=1e-4, atol=1e-5), (expert, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("more", [(), ("k_img", "v_img")], ids=["text", "image"])
def test_diffusers_applies_loras_of_wan_21_i2v(
    more: tuple[str, ...], form: Form, tiny_wan21_i2v: Path, tmp_path: Path
) -> None:
    """With and without the layers for CLIP's embedding; for LoRAs without, diffusers adds zeros."""
    roles = trained(tiny_wan21_i2v, "full", ALL + more, tmp_path, boundary=None)
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_wan21_i2v)
    pipeline.load_lora_weights(str(lora_path(tmp_path, "full", form)))
    rng = torch.Generator().manual_seed(1)
    shapes = ((2, 36, 3, 6, 10), (2, 512, 32), (2, 10, 32))
    latents, text, clip = (torch.randn(*shape, generator=rng) for shape in shapes)
    inputs = (latents, torch.tensor([937.5, 300.0]), text, clip)
    with torch.no_grad():
        found = pipeline.transformer(*inputs, return_dict=False)[0]
        with roles.generator():
            expected = roles.transformer(*inputs, return_dict=False)[0]
        with roles.teacher():
            base = roles.transformer(*inputs, return_dict=False)[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).norm() / base.norm() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_our_own_files_are_read_as_they_were_written(
    form: Form, tiny_t2v: Path, tmp_path: Path
) -> None:
    roles = trained(tiny_t2v, "low", ("q", "ffn.2"), tmp_path)
    read = read_lora(lora_path(tmp_path, "low", form))
    assert (read.form, read.alpha_assumed, set(read.lora.alphas.values())) == (form, False, {1.0})
    expected = roles.parameters(GENERATOR)
    assert read.lora.weights.keys() == expected.keys()
    assert all(torch.equal(read.lora.weights[name], expected[name]) for name in expected)


def test_forms_avoid_the_known_traps(tiny_t2v: Path, tmp_path: Path) -> None:
    trained(tiny_t2v, "low", ALL, tmp_path)
    diffusers = load_file(lora_path(tmp_path, "low", "diffusers"))
    assert all(name.startswith("transformer.blocks.") for name in diffusers)
    assert not any(name.endswith(".alpha") for name in diffusers)
    with safe_open(lora_path(tmp_path, "low", "diffusers"), framework="pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (4, 1.0)

    comfyui = load_file(lora_path(tmp_path, "low", "comfyui"))
    modules = {name.split(".lora_")[0] for name in comfyui if ".lora_" in name}
    assert "diffusion_model.blocks.1.self_attn.q" in modules
    assert "diffusion_model.blocks.0.ffn.2" in modules
    assert all(comfyui[module + ".alpha"].item() == 1.0 for module in modules)


@pytest.mark.parametrize(
    ("expert", "mode", "changes", "expected"),
    [
        (
            "high",
            "i2v",
            {},
            {
                "ss_base_model_version": "wan2.2",
                "ss_network_dim": "4",
                "ss_network_alpha": "1",
                "ss_output_name": "lora-high",
                "modelspec.architecture": "wan2.2/lora",
                "modelspec.timestep_range": "900,1000",
                "modelspec.resolution": "96x64",
                "modelspec.usage_hint": "4 steps at timesteps 1000.0, 937.5, 833.3, 625.0 (shift 5)"
                ", CFG 1, sampler LCM",
            },
        ),
        (
            "full",
            "t2v",
            {"boundary": None, "alpha": 1.5, "recipe": {"seed": 7, "learning_rate": 1e-5}},
            {
                "ss_base_model_version": "wan2.1",
                "ss_network_alpha": "1.5",
                "ss_seed": "7",
                "ss_learning_rate": "1e-05",
                "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
                "modelspec.title": "lora-full, wan2.1 t2v, all steps",
                "modelspec.timestep_range": "0,1000",
            },
        ),
    ],
)
def test_other_tools_find_their_fields(
    expert: Expert, mode: str, changes: dict[str, object], expected: dict[str, str]
) -> None:
    metadata = provenance(expert, mode, **changes).metadata()
    assert expected.items() <= metadata.items()
    assert not any("date" in key or "time" in key.split("_") for key in metadata)


def test_equal_content_gives_equal_bytes(tiny_t2v: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained(tiny_t2v, "high", ALL, tmp_path / name)
    for form in FORMS:
        one, other = (lora_path(tmp_path / name, "high", form).read_bytes() for name in ("a", "b"))
        assert one == other


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("q",), ("attn1.to_q", "attn2.to_q")),
        (("self_attn.q",), ("attn1.to_q",)),
        (("to_k",), ("attn1.to_k", "attn2.to_k")),
        (("o", "ffn.0"), ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.0.proj")),
        (("ffn.net.2", "cross_attn.v"), ("attn2.to_v", "ffn.net.2")),
    ],
)
def test_target_names_of_both_worlds(
    tiny_t2v: Path, names: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    base = load_base(
        read_model_spec(tiny_t2v), "low", precision="no", device=CPU, gradient_checkpointing=False
    )
    assert select_targets(base, names) == expected


def test_file_without_provenance_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors has no training metadata"):
        read_provenance(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"cannot read .*y\.safetensors"):
        read_provenance(tmp_path / "y.safetensors")
