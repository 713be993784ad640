"""LoRA files of every form, read into one: against diffusers' own reading of the same files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from shared.errors import UserError
from shared.models.wan import WAN
from train.model.lora_files import LoraFile, check_fits, read_lora

WIDTH, HIDDEN, RANK, ALPHA = 12, 20, 4, 3.0
BLOCKS = 2
SIX = ("q", "k", "v", "o")
LAYERS = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in SIX]
LAYERS += ["ffn.0", "ffn.2"]


def pairs(layers: list[str] = LAYERS, rank: int = RANK) -> dict[str, dict[str, torch.Tensor]]:
    """Wan's name of a module → {"down": (rank, in), "up": (out, rank)}, random."""
    rng = torch.Generator().manual_seed(3)

    def made(layer: str) -> dict[str, torch.Tensor]:
        width_in = HIDDEN if layer == "ffn.2" else WIDTH
        width_out = HIDDEN if layer == "ffn.0" else WIDTH
        return {
            "down": torch.randn(rank, width_in, generator=rng),
            "up": torch.randn(width_out, rank, generator=rng),
        }

    return {f"blocks.{block}.{layer}": made(layer) for block in range(BLOCKS) for layer in layers}


def diffusers_name(module: str) -> str:
    _, block, layer = module.split(".", 2)
    return f"blocks.{block}.{WAN.lora_layers[layer]}"


def original(
    prefix: str = "diffusion_model.", down: str = "lora_down", up: str = "lora_up"
) -> Callable[[str, str], str]:
    return lambda module, part: f"{prefix}{module}.{({'down': down, 'up': up})[part]}.weight"


def diffusers(prefix: str) -> Callable[[str, str], str]:
    return lambda module, part: (
        f"{prefix}{diffusers_name(module)}.lora_{'A' if part == 'down' else 'B'}.weight"
    )


def kohya(prefix: str = "lora_unet_") -> Callable[[str, str], str]:
    return lambda module, part: f"{prefix}{module.replace('.', '_')}.lora_{part}.weight"


def tensors_of(name: Callable[[str, str], str], **kind: object) -> dict[str, torch.Tensor]:
    return {
        name(module, part): tensor
        for module, held in pairs(**kind).items()  # type: ignore[arg-type]
        for part, tensor in held.items()
    }


def with_alpha(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with an alpha beside every pair: 3 in block 0, 5 in block 1."""
    alphas = {
        f"{key.split('.lora_')[0]}.alpha": torch.tensor(
            5.0 if "blocks.1" in key or "blocks_1" in key else ALPHA
        )
        for key in tensors
    }
    return {**tensors, **alphas}


def written(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file(dict(tensors), path, metadata or None)
    return path


def assert_holds(read: LoraFile, alphas: Callable[[str], float]) -> None:
    """The file's modules, each with the matrices of `pairs`, scaled by alpha / rank."""
    expected = {diffusers_name(module): held for module, held in pairs().items()}
    assert set(read.lora.modules) == set(expected)
    for module, held in expected.items():
        assert read.lora.rank(module) == RANK
        product = held["up"].double() @ held["down"].double() * (alphas(module) / RANK)
        assert torch.allclose(read.lora.delta(module).double(), product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (original(), "comfyui"),
        (original(prefix="", down="lora_A.default", up="lora_B.default"), "comfyui"),
        (original(prefix="pipe.dit.", down="lora_A", up="lora_B"), "comfyui"),
        (original(prefix="model.diffusion_model."), "comfyui"),
        (kohya(), "kohya"),
        (kohya("lora_unet__"), "kohya"),
        (diffusers("transformer."), "diffusers"),
        (diffusers(""), "diffusers"),
        (diffusers("base_model.model."), "diffusers"),
        (diffusers("transformer_2."), "diffusers"),
    ],
)
def test_every_form_is_read_with_its_alphas(
    name: Callable[[str, str], str], form: str, tmp_path: Path
) -> None:
    read = read_lora(written(tmp_path / "x.safetensors", with_alpha(tensors_of(name))))
    assert (read.form, read.alpha_assumed, read.note) == (form, False, None)
    assert_holds(read, lambda module: 5.0 if module.startswith("blocks.1") else ALPHA)
    assert read.for_transformer_2 == name("blocks.0.ffn.0", "up").startswith("transformer_2.")

    without_ending = (tmp_path / "x.safetensors").rename(tmp_path / "x")
    assert_holds(read_lora(without_ending), lambda m: 5.0 if m.startswith("blocks.1") else ALPHA)

    bare = read_lora(written(tmp_path / "y.safetensors", tensors_of(name)))
    assert bare.alpha_assumed and "y.safetensors has no alpha" in (bare.note or "")
    assert_holds(bare, lambda module: float(RANK))


@pytest.mark.parametrize("name", [original(), kohya()], ids=["comfyui", "kohya"])
def test_same_product_as_diffusers_reads(name: Callable[[str, str], str], tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", with_alpha(tensors_of(name)))
    state = WanPipeline.lora_state_dict(str(path))
    read = read_lora(path).lora
    assert {key.split(".lora_")[0] for key in state} == {f"transformer.{m}" for m in read.modules}
    for module in read.modules:
        down, up = (state[f"transformer.{module}.lora_{half}.weight"].double() for half in "AB")
        assert torch.allclose(read.delta(module).double(), up @ down, rtol=1e-5, atol=1e-6)


def test_clip_layers_of_wan_21(tmp_path: Path) -> None:
    layers = [*LAYERS, "cross_attn.k_img", "cross_attn.v_img"]
    for name in (original(), kohya()):
        path = written(tmp_path / "x.safetensors", with_alpha(tensors_of(name, layers=layers)))
        state, read = WanPipeline.lora_state_dict(str(path)), read_lora(path).lora
        for module in ("blocks.1.attn2.add_k_proj", "blocks.0.attn2.add_v_proj"):
            down, up = (state[f"transformer.{module}.lora_{half}.weight"].double() for half in "AB")
            assert torch.allclose(read.delta(module).double(), up @ down, rtol=1e-5, atol=1e-6)


def test_alpha_from_pefts_configuration(tmp_path: Path) -> None:
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": ALPHA,
        "transformer.alpha_pattern": {r"blocks.1.ffn.net.2": 7.0, "attn2.to_q": 1.5},
    }
    read = read_lora(
        written(
            tmp_path / "x.safetensors",
            tensors_of(diffusers("transformer.")),
            lora_adapter_metadata=json.dumps(config),
        )
    )
    assert not read.alpha_assumed
    assert read.lora.alphas["blocks.1.ffn.net.2"] == 7.0
    assert read.lora.alphas["blocks.0.attn2.to_q"] == 1.5
    assert read.lora.alphas["blocks.0.ffn.net.2"] == ALPHA


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A ComfyUI file with tensors put in ("__" is a dot) or, with None, taken out."""
    tensors = with_alpha(tensors_of(original()))
    for name, tensor in changes.items():
        key = "diffusion_model." + name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    return tensors


SOME = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(blocks__0__ffn__0__dora_scale=SOME), "it is a DoRA"),
        (changed(blocks__0__ffn__0__lokr_w1=SOME), "it is a LoKr, LoHa or OFT"),
        (
            changed(blocks__0__ffn__0__base_layer__bias=SOME),
            r"1 of its 61 tensors .*base_layer\.bias: it is a LoRA with whole weights",
        ),
        (
            changed(head__head__lora_down__weight=SOME),
            r"lacks lora_B .* of proj_out \(head\.head\)",
        ),
        (
            changed(head__heads__lora_down__weight=SOME),
            "layers that a Wan transformer does not have",
        ),
        (changed(blocks__0__self_attn__qq__lora_up__weight=SOME), "on self_attn.q, self_attn.k"),
        ({"lora_unet_blocks_0_attn_q.alpha": SOME}, "names of no known form"),
        ({"lora_te_layers_0.lora_up.weight": SOME}, "a LoRA of another model than Wan"),
        ({"vace_blocks.0.ffn.0.lora_A.weight": SOME}, "layers that a Wan transformer does not"),
        (
            changed(blocks__1__ffn__0__lora_up__weight=None),
            r"lacks lora_B \(lora_up\) of blocks\.1\.ffn\.net\.0\.proj \(blocks\.1\.ffn\.0\)",
        ),
        (
            changed(blocks__1__ffn__0__lora_up__weight=torch.ones(HIDDEN, 3)),
            r"A of shape \[4, 12\] and B of \[20, 3\]; expected \(rank, in\) and \(out, rank\)",
        ),
        (changed(blocks__1__ffn__0__alpha=torch.tensor(float("nan"))), "alpha of .* is nan"),
        (changed(blocks__1__ffn__0__alpha=torch.ones(2)), r"alpha of .* has shape \[2\]"),
        (
            {**tensors_of(diffusers("transformer.")), **tensors_of(diffusers("transformer_2."))},
            "twice: transformer and transformer_2, one LoRA for each expert",
        ),
        (
            {
                **tensors_of(diffusers("transformer."), layers=["ffn.0"]),
                **tensors_of(kohya(), layers=["ffn.2"]),
            },
            "names of several forms .diffusers: .*; kohya: ",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_lora(written(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "metadata of .* is damaged"),
        ("[]", "metadata of .* is damaged"),
        ('{"transformer.r": 4}', "is damaged .KeyError: 'lora_alpha'"),
        ('{"r": 8, "lora_alpha": 3}', "have rank 4, the .* metadata of .* says 8"),
        ('{"r": 4, "lora_alpha": "x"}', "is 'x'; expected a number"),
        ('{"r": 4, "lora_alpha": 3, "use_dora": true}', "metadata of .* has use_dora=True"),
    ],
)
def test_configuration_that_contradicts_is_refused(
    config: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    written(path, tensors_of(diffusers("transformer.")), lora_adapter_metadata=config)
    with pytest.raises(UserError, match=message):
        read_lora(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    for path, why in (
        ("x.safetensors", "Error"),
        ("empty", "is a folder without a LoRA"),
        ("y", "no such file"),
    ):
        with pytest.raises(UserError, match=why):
            read_lora(tmp_path / path)


def test_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    read = read_lora(written(tmp_path / "x.safetensors", with_alpha(tensors_of(original()))))
    shapes = {
        f"{module}.weight": torch.Size(
            [read.lora.up(module).shape[0], read.lora.down(module).shape[1]]
        )
        for module in read.lora.modules
    }
    check_fits(read, shapes, "the model")
    narrow = shapes | {"blocks.1.attn1.to_k.weight": torch.Size([WIDTH, WIDTH + 1])}
    with pytest.raises(UserError, match=r"to_k .*shape \[12, 12\]; the model has \[12, 13\]"):
        check_fits(read, narrow, "the model")
    shallow = {name: shape for name, shape in shapes.items() if "blocks.0" in name}
    with pytest.raises(UserError, match=r"adapts blocks\.1\.attn1.* which the model does not have"):
        check_fits(read, shallow, "the model")
