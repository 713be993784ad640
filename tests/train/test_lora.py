"""LoRA files loaded back by diffusers: the pipeline's transformer equals the trained module."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from shared.errors import UserError
from shared.model_spec import read_model_spec
from tests.train.conftest import randomise_lora
from tests.train.test_roles import CPU, build_batch
from train.base import load_base
from train.export import FORMS, Provenance, lora_path, read_provenance, write_loras
from train.flow import Expert
from train.lora import LoraSpec, select_targets
from train.roles import GENERATOR, Roles

ALL = ("q", "k", "v", "o", "ffn.0", "ffn.2")


def provenance(expert: Expert, mode: str, **changes: object) -> Provenance:
    values = {
        "expert": expert,
        "mode": mode,
        "denoising_step_indices_list": (1000.0, 750.0, 500.0, 250.0),
        "flow_shift": 5.0 if mode == "i2v" else 12.0,
        "boundary": 0.9 if mode == "i2v" else 0.875,
        "pairing": "renoise",
        "base": "",
        "rank": 4,
        "alpha": 1.0,
        "generator_updates": 1,
        "recipe": {},
    }
    return Provenance(**(values | changes))  # type: ignore[arg-type]


def trained(
    model: Path, expert: Expert, targets: tuple[str, ...], folder: Path, **changes: object
) -> Roles:
    """Roles with a random generator LoRA of rank 4, alpha 1, written to `folder` in both forms."""
    spec = read_model_spec(model)
    base = load_base(spec, expert, precision="no", device=CPU, gradient_checkpointing=False)
    lora = LoraSpec(rank=4, alpha=1, targets=select_targets(base, targets))
    roles = Roles(base, lora, seed=0)
    randomise_lora(roles.parameters(GENERATOR), seed=len(expert), scale=0.4)
    told = provenance(expert, spec.mode, **changes)
    write_loras(folder, roles.parameters(GENERATOR), lora, told, torch.float32)
    return roles


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", [("q", "k", "v", "ffn.0", "ffn.2"), ("q", "o"), ALL], ids=str)
@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_diffusers_applies_what_was_trained(
    mode: str, targets: tuple[str, ...], form: str, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    model = tiny_i2v if mode == "i2v" else tiny_t2v
    kind = WanImageToVideoPipeline if mode == "i2v" else WanPipeline
    pipeline = kind.from_pretrained(model)
    batch, t = build_batch(mode), torch.tensor([937.5, 300.0])
    inputs = [batch.latents] if batch.condition is None else [batch.latents, batch.condition]

    for expert, component in (("high", "transformer"), ("low", "transformer_2")):
        roles = trained(model, expert, targets, tmp_path)  # type: ignore[arg-type]
        pipeline.load_lora_weights(
            str(lora_path(tmp_path, expert, form)),  # type: ignore[arg-type]
            adapter_name=expert,
            load_into_transformer_2=expert == "low",
        )
        with torch.no_grad():
            found = getattr(pipeline, component)(
                torch.cat(inputs, dim=1), t, batch.text, return_dict=False
            )[0]
            with roles.generator():
                expected = roles.velocity(batch.latents, t, batch.text, batch.condition)
            with roles.teacher():
                base = roles.velocity(batch.latents, t, batch.text, batch.condition)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), (expert, form)
        assert (expected - base).norm() / base.norm() > 0.01


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
    with pytest.raises(UserError, match=r"x\.safetensors does not say how it was trained"):
        read_provenance(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"cannot read .*y\.safetensors"):
        read_provenance(tmp_path / "y.safetensors")
