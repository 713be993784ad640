"""Every component, in every layout, with every oddity of its tensors: understood to the bit, or
refused by name. diffusers and transformers load nearly all of these without a word."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, UMT5EncoderModel

from shared.errors import UserError
from shared.io.hashing import FileHasher
from shared.models import weights
from shared.models.digest import component_digest
from shared.models.original_layout import expert_folder
from shared.models.wan import WAN
from tests.models import tiny_model
from tests.original_layout import TRANSFORMER, renamed, write_original

State = dict[str, torch.Tensor]
COMPONENTS = ("vae", "text_encoder", "image_encoder", "transformer", "transformer_2")
LAYOUTS = ("diffusers", "diffusers sharded", "original", "original safetensors", "comfyui")
EXPERTS = ("transformer", "transformer_2")
ORIGINAL_NAME = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
COMFYUI_NAME = {
    "vae": "wan_2.1_vae.safetensors",
    "text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "image_encoder": "clip_vision_h.safetensors",
}
load = partial(weights.load_component, WAN)


@dataclass(frozen=True)
class Cell:
    """A component in a model folder of its own, that may be spoilt."""

    model: Path
    component: str
    layout: str

    @property
    def diffusers(self) -> bool:
        return self.layout.startswith("diffusers")

    @property
    def folder(self) -> Path:
        """Of the component's files."""
        if self.diffusers:
            return self.model / self.component
        return expert_folder(self.model, self.component) if self.is_expert else self.model

    @property
    def is_expert(self) -> bool:
        return self.component in EXPERTS

    @property
    def stem(self) -> str:
        of_transformers = self.component in ("text_encoder", "image_encoder")
        return "model" if self.diffusers and of_transformers else "diffusion_pytorch_model"

    @property
    def sharded(self) -> bool:
        return self.layout == "diffusers sharded" or (self.layout == "original" and self.is_expert)

    @property
    def file(self) -> Path:
        """The one file, where it is one."""
        if self.diffusers or (self.is_expert and self.layout != "comfyui"):
            return self.folder / f"{self.stem}.safetensors"
        if self.is_expert:
            return self.folder / "wan_fp8_scaled.safetensors"
        if self.layout == "comfyui":
            return self.folder / COMFYUI_NAME[self.component]
        name = ORIGINAL_NAME[self.component]
        return self.folder / (name if self.layout == "original" else f"{name[:-4]}.safetensors")

    def write(self, state: State) -> None:
        """These tensors, and no others, as the component's files."""
        if not self.sharded:
            if self.file.suffix == ".pth":
                torch.save(state, self.file)
            else:
                save_file({n: t.contiguous().clone() for n, t in state.items()}, self.file)
            return
        names = sorted(state)
        where = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = self.shard(number)
            save_file({name: state[name].contiguous().clone() for name in part}, file)
            where |= dict.fromkeys(part, file.name)
        self.index.write_text(json.dumps({"metadata": {}, "weight_map": where}))

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}-of-00002.safetensors"

    @property
    def index(self) -> Path:
        return self.folder / f"{self.stem}.safetensors.index.json"

    def load(self, dtype: torch.dtype = torch.float32) -> State:
        return dict(load(self.model, self.component, dtype=dtype).state_dict())

    def digest(self, memo: Path) -> str | None:
        assert not self.is_expert
        return component_digest(self.model, self.component, FileHasher(memo))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(family, original layout?) → folder. Wan 2.1 i2v has CLIP, Wan 2.2 a second expert."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for mode in ("wan21-i2v", "t2v"):
        torch.manual_seed(7)
        vae = AutoencoderKLWan(base_dim=4)
        made = tiny_model(
            folder / mode, mode, two_experts=mode == "t2v", vae=vae, rope_max_seq_len=1024
        )  # type: ignore[arg-type]
        found[mode, False] = made
        found[mode, True] = write_original(made, folder / f"{mode}-original")
    return found


CELLS = [(component, layout) for component in COMPONENTS for layout in LAYOUTS]
# Those whose files lie in a folder of their own, and those with an index.
FOLDERS = [(c, x) for c, x in CELLS if "diffusers" in x or (c in EXPERTS and x != "comfyui")]
SHARDED = [(c, x) for c, x in FOLDERS if x in ("diffusers sharded", "original")]


@pytest.fixture(params=CELLS, ids="-".join)
def cell(
    request: pytest.FixtureRequest, models: dict[tuple[str, bool], Path], tmp_path: Path
) -> Iterator[tuple[Cell, State]]:
    """A cell of the table and the tensors of its component, by the names of its layout."""
    component, layout = request.param
    family = "t2v" if component == "transformer_2" else "wan21-i2v"
    source = models[family, not layout.startswith("diffusers")]
    model = Path(shutil.copytree(source, tmp_path / "model", copy_function=os.link))
    made = Cell(model, component, layout)
    state: State = {}
    if not made.diffusers and not made.is_expert:
        published = model / ORIGINAL_NAME[component]
        state = torch.load(published, weights_only=True)
        published.unlink()
    else:
        for file in made.folder.glob("*.safetensors"):
            state |= load_file(file)
            file.unlink()
    if layout == "comfyui":
        state = _as_comfyui(made, state, models[family, False])
    made.write(state)
    yield made, state


def _as_comfyui(cell: Cell, state: State, diffusers: Path) -> State:
    """ComfyUI's files have transformers' names for UMT5 and CLIP, and Wan's for the rest."""
    if cell.is_expert:
        return {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    if cell.component == "vae":
        return state
    own = load_file(diffusers / cell.component / "model.safetensors")
    if cell.component == "image_encoder":
        own = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in own.items()}
        return own | {"visual_projection.weight": torch.ones(3, 2)}
    return own | {"spiece_model": torch.ones(9, dtype=torch.uint8)}


def layers(state: State) -> list[str]:
    """What fp8 files scale: convolutions of a VAE, linear layers of the rest."""
    tables = ("shared", "token_embedding", "embedding", "relative_attention_bias")
    return [
        layer
        for name, tensor in sorted(state.items())
        if (layer := name.removesuffix(".weight")) != name
        and tensor.ndim >= 2
        and tensor.is_floating_point()
        and "textual" not in name
        and not layer.endswith(tables)
    ]


# Understood


def scaled(state: State, style: str) -> tuple[State, State]:
    """(as an fp8 file has them, what it stands for)."""
    held, meant = dict(state), dict(state)
    for layer in layers(state):
        weight = state[f"{layer}.weight"]
        if style == "rows":
            scale = (weight.flatten(1).abs().amax(1) / 448 + 1e-9).float()
        else:
            scale = (weight.abs().max() / 448).float()
        rows = scale.reshape(-1, *(1 for _ in weight.shape[1:])) if style == "rows" else scale
        held[f"{layer}.weight"] = (weight.float() / rows).to(torch.float8_e4m3fn)
        meant[f"{layer}.weight"] = held[f"{layer}.weight"].float() * rows
        held[f"{layer}.{'scale_weight' if style == 'old' else 'weight_scale'}"] = scale
        held[f"{layer}.{'scale_input' if style == 'old' else 'input_scale'}"] = torch.ones(1)
        if style == "new":
            held[f"{layer}.comfy_quant"] = _told_fp8()
    if style == "old":
        held["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return held, meant


def _told_fp8() -> torch.Tensor:
    told = json.dumps({"format": "float8_e4m3fn"}).encode()
    return torch.frombuffer(bytearray(told), dtype=torch.uint8)


def plain_fp8(state: State) -> tuple[State, State]:
    held = dict(state)
    for layer in layers(state):
        held[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
    return held, {name: t.float() if t.dtype.itemsize == 1 else t for name, t in held.items()}


def wrapped(prefix: str) -> Callable[[State], tuple[State, State]]:
    return lambda state: ({prefix + name: tensor for name, tensor in state.items()}, state)


def other_halves(state: State) -> tuple[State, State]:
    """What repositories hold beside an encoder, and no model of ours has a place for."""
    more: State = {}
    if "shared.weight" in state:
        more = {
            "encoder.embed_tokens.weight": state["shared.weight"].clone(),
            "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4),
            "lm_head.weight": torch.ones(4, 4),
        }
    elif any("embeddings.patch_embedding" in name for name in state):
        more = {
            "vision_model.embeddings.position_ids": torch.arange(5)[None],
            "text_model.embeddings.token_embedding.weight": torch.ones(4, 4),
            "text_projection.weight": torch.ones(4, 4),
            "logit_scale": torch.tensor(1.0),
        }
    return state | more, state


def of_fsdp(state: State) -> tuple[State, State]:
    """Its wrapper stands before all names, and again behind the number of each block."""
    inside = "_fsdp_wrapped_module."
    held = {re.sub(r"^(.+?\.\d+\.)", rf"\1{inside}", name): t for name, t in state.items()}
    return {inside + name: tensor for name, tensor in held.items()}, state


UNDERSTOOD: dict[str, Callable[[State], tuple[State, State]]] = {
    "clean": lambda state: (state, state),
    "scaled fp8, old": lambda state: scaled(state, "old"),
    "scaled fp8, new": lambda state: scaled(state, "new"),
    "scaled fp8 by row": lambda state: scaled(state, "rows"),
    "scaled fp8, wrapped": lambda state: (
        {f"model.{name}": tensor for name, tensor in scaled(state, "old")[0].items()},
        scaled(state, "old")[1],
    ),
    "plain fp8": plain_fp8,
    "of DDP": wrapped("module."),
    "of torch.compile": wrapped("_orig_mod."),
    "of both": wrapped("module._orig_mod."),
    "of FSDP, in every block too": of_fsdp,
    "of three trainers": wrapped("net.module.model."),
    "the other halves": other_halves,
}


@pytest.mark.parametrize("oddity", UNDERSTOOD)
def test_what_is_understood_equals_the_clean_file(
    oddity: str, cell: tuple[Cell, State], tmp_path: Path
) -> None:
    place, state = cell
    held, meant = UNDERSTOOD[oddity](state)
    place.write(meant)
    # In bf16, to which a scaled weight is rounded once; what stays in fp32 isn't rounded at all.
    expected = {name: t.clone() for name, t in place.load(torch.bfloat16).items()}
    digest = None if place.is_expert else place.digest(tmp_path / "memo")
    place.write(held)
    found = place.load(torch.bfloat16)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    if not place.is_expert:
        assert place.digest(tmp_path / "memo") == digest is not None


def test_it_is_what_the_libraries_load(models: dict[tuple[str, bool], Path]) -> None:
    """Of clean folders, in their layout; dtypes, too."""
    for dtype in (torch.float32, torch.bfloat16):
        for component in COMPONENTS:
            model = models["t2v" if component == "transformer_2" else "wan21-i2v", False]
            kind: Any = {
                "vae": AutoencoderKLWan,
                "text_encoder": UMT5EncoderModel,
                "image_encoder": CLIPVisionModel,
            }.get(component, WanTransformer3DModel)
            theirs = kind.from_pretrained(model / component, dtype=dtype).state_dict()
            ours = load(model, component, dtype=dtype).state_dict()
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


# Refused


def _first_layer(state: State) -> str:
    return layers(state)[0]


def without(state: State, ending: str) -> State:
    lost = min(name for name in state if name.endswith(ending))
    return {name: tensor for name, tensor in state.items() if name != lost}


def _of_peft(state: State) -> State:
    """A model with its adapter as peft's own state has it."""
    held = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    layer = f"base_model.model.{_first_layer(state)}"
    held[f"{layer}.base_layer.weight"] = held.pop(f"{layer}.weight")
    held[f"{layer}.lora_A.default.weight"] = torch.ones(2, 3)
    held[f"{layer}.lora_B.default.weight"] = torch.ones(3, 2)
    return held


Spoil = Callable[[State], State]
REFUSED: dict[str, tuple[Spoil, str]] = {
    "adapter": (
        lambda s: (
            s
            | {f"{_first_layer(s)}.lora_{x}.weight": torch.ones(2, 2) for x in ("down", "up")}
            | {f"{_first_layer(s)}.alpha": torch.tensor(2.0)}
        ),
        r"has 3 weights too many, the first .*alpha.*: an adapter \(a LoRA.*Merge it",
    ),
    "adapter of kohya": (
        lambda s: s | {"lora_te_blocks_0_q.lora_down.weight": torch.ones(2, 2)},
        r"has 1 weights too many, the first .*lora_te_\w+\.lora_down\.weight: an adapter",
    ),
    "adapter of peft": (_of_peft, r"has 3 weights too many, .*base_layer.*: an adapter"),
    "hada": (
        lambda s: s | {f"{_first_layer(s)}.hada_w1_a": torch.ones(2, 2)},
        "1 weights too many, the first .*hada_w1_a: an adapter",
    ),
    "diff": (
        lambda s: s | {f"{_first_layer(s)}.diff": torch.ones(2, 2)},
        r"1 weights too many, the first .*\.diff: an adapter",
    ),
    "average": (
        lambda s: s | {f"ema.{name}": tensor for name, tensor in s.items()},
        r"has \d+ weights too many, the first .*ema\..*: a second copy of the weights",
    ),
    "wrapped in part": (
        lambda s: s | {"module.extra.bias": torch.ones(2)},
        r"1 weights too many, the first module\.extra\.bias\. ",
    ),
    "something else": (
        lambda s: s | {"extra.weight": torch.ones(2)},
        r"has 1 weights too many, the first extra\.weight\. ",
    ),
    "scales by block": (
        lambda s: s | {f"{_first_layer(s)}.weight_scale_inv": torch.ones(2, 2)},
        "1 weights too many, the first .*weight_scale_inv: scales or codes of a quantisation",
    ),
    "bitsandbytes": (
        lambda s: s | {f"{_first_layer(s)}.weight.absmax": torch.ones(2)},
        r"1 weights too many, the first .*\.weight\.absmax: scales or codes of a quantisation",
    ),
    "int8": (
        lambda s: s | {f"{_first_layer(s)}.weight": s[f"{_first_layer(s)}.weight"].to(torch.int8)},
        r"quantised in a way that is not read: .*\.weight is int8",
    ),
    "a scale is lost": (
        lambda s: without(scaled(s, "old")[0], ".scale_weight"),
        r"scaled fp8 weights, but 1 of them have no scale, the first ",
    ),
    "all scales are lost": (
        lambda s: {n: t for n, t in scaled(s, "old")[0].items() if "scale_weight" not in n},
        r"scaled fp8 weights, but \d+ of them have no scale, the first ",
    ),
    "a weight is lost": (
        lambda s: {
            n: t for n, t in scaled(s, "new")[0].items() if n != f"{_first_layer(s)}.weight"
        },
        "has a scale for .*, but not that weight",
    ),
    "scales of plain weights": (
        lambda s: s | {f"{_first_layer(s)}.scale_weight": torch.ones(1)},
        r"has a scale for .*, which is float32, not fp8",
    ),
    "no fp8 though it says so": (
        lambda s: s | {f"{_first_layer(s)}.comfy_quant": _told_fp8()},
        r"marks .* as fp8, but it is float32",
    ),
    "a scale of fp8 arithmetic without a layer": (
        lambda s: s | {"no.such.layer.input_scale": torch.ones(1)},
        r"has no\.such\.layer\.input_scale, .*, but no\.such\.layer\.weight is not there",
    ),
    "a scale of fp8 arithmetic of a plain layer": (
        lambda s: s | {f"{_first_layer(s)}.scale_input": torch.ones(1)},
        r"scale_input, a scale of fp8 arithmetic, but .*\.weight is float32",
    ),
    "a marker inside": (
        lambda s: s | {"x.y.scaled_fp8": torch.ones(3)},
        r"1 weights too many, the first x\.y\.scaled_fp8",
    ),
    "like what has no part": (
        lambda s: s | {"norm_added_q_extra": torch.ones(3), "foo.bar_position_ids": torch.ones(3)},
        r"has 2 weights too many, the first foo\.bar_position_ids, norm_added_q_extra",
    ),
    "scale without a number": (
        lambda s: scaled(s, "old")[0] | {f"{_first_layer(s)}.scale_weight": torch.tensor(math.inf)},
        r"has a scale for .*\.weight that is not finite",
    ),
    "fp8 of another kind": (
        lambda s: (
            s
            | {
                f"{_first_layer(s)}.weight": s[f"{_first_layer(s)}.weight"].to(
                    torch.float8_e4m3fnuz
                )
            }
        ),
        r"quantised in a way that is not read: .*\.weight is float8_e4m3fnuz",
    ),
    "a buffer": (
        lambda s: s | {"bn.num_batches_tracked": torch.tensor(3)},
        r"1 weights too many, the first bn\.num_batches_tracked\. ",
    ),
    "boft": (
        lambda s: s | {f"{_first_layer(s)}.boft_R.default": torch.ones(4)},
        r"1 weights too many, the first .*boft_R\.default: an adapter",
    ),
    "only the average": (
        lambda s: {f"ema.{name}": tensor for name, tensor in s.items()},
        r"holds nothing but an average of weights \(EMA\)",
    ),
    "two scales": (
        lambda s: scaled(s, "old")[0] | {f"{_first_layer(s)}.weight_scale": torch.ones(1)},
        "has two scales for ",
    ),
    "missing": (
        lambda s: {n: t for n, t in s.items() if n != f"{_first_layer(s)}.weight"},
        r"lacks [13] weights, the first |has no weights of a .*\(KeyError",
    ),
    "unknown names": (
        lambda s: {f"{n}_v2" if n == f"{_first_layer(s)}.weight" else n: t for n, t in s.items()},
        r"lacks [13] weights, the first \S+, and has 1 weights too many, the first \S+_v2"
        r"|has no weights of a .*\(KeyError",
    ),
    "another shape": (
        lambda s: (
            s
            | {
                f"{_first_layer(s)}.weight": torch.cat(
                    [s[f"{_first_layer(s)}.weight"], s[f"{_first_layer(s)}.weight"]]
                )
            }
        ),
        r"has shape \[.*\], expected \[",
    ),
}


@pytest.mark.parametrize("oddity", REFUSED)
def test_what_is_not_understood_is_refused(
    oddity: str, cell: tuple[Cell, State], tmp_path: Path
) -> None:
    place, state = cell
    spoil, message = REFUSED[oddity]
    place.write(spoil(state))
    with pytest.raises(UserError, match=message) as refused:
        place.load()
    assert str(place.folder) in str(refused.value)
    _check_first(place, str(refused.value), tmp_path)


def _check_first(place: Cell, message: str, tmp_path: Path) -> None:
    """The same is said before weights are read: by the check of training, and before a digest."""

    def check(component: str) -> None:
        weights.check_component(WAN, place.model, component)

    with pytest.raises(UserError, match=re.escape(message)):
        check(place.component)
    if not place.is_expert:
        memo = tmp_path / "memo"
        with pytest.raises(UserError, match=re.escape(message)):
            component_digest(place.model, place.component, FileHasher(memo), check)
        assert not memo.exists()


# Files that contradict one another


def _stray(place: Cell, state: State) -> None:
    save_file({"extra": torch.ones(1)}, place.folder / "pytorch_lora_weights.safetensors")


def _adapter_file(place: Cell, state: State) -> None:
    torch.save({"extra": torch.ones(1)}, place.folder / "adapter_model.bin")


def _unnamed(place: Cell, state: State) -> None:
    """An index that names the first file alone."""
    where = json.loads(place.index.read_text())["weight_map"]
    kept = {name: file for name, file in where.items() if file == place.shard(1).name}
    place.index.write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def _names_more(place: Cell, state: State) -> None:
    index = json.loads(place.index.read_text())
    index["weight_map"]["extra.weight"] = "lost.safetensors"
    place.index.write_text(json.dumps(index))


def _in_both(place: Cell, state: State) -> None:
    both = load_file(place.shard(2))
    name = min(load_file(place.shard(1)))
    save_file(both | {name: torch.ones_like(state[name])}, place.shard(2))


def _whole_too(place: Cell, state: State) -> None:
    save_file(
        {n: t.contiguous().clone() for n, t in state.items()},
        place.folder / f"{place.stem}.safetensors",
    )


FilesSpoil = Callable[[Cell, State], None]
IN_FOLDERS: dict[str, tuple[FilesSpoil, str]] = {
    "stray": (_stray, r"pytorch_lora_weights\.safetensors does not belong to the weights"),
    "adapter": (_adapter_file, r"adapter_model\.bin does not belong to the weights [^,]*\."),
}
IN_SHARDS: dict[str, tuple[FilesSpoil, str]] = {
    "index names fewer": (
        _unnamed,
        r"-00002-of-00002\.safetensors does not belong to the weights of .*index\.json",
    ),
    "index names more": (_names_more, r"names lost\.safetensors, which is not in its folder"),
    "index of nothing": (
        lambda place, _: place.index.write_text('{"weight_map": {}}') and None,
        r"index\.json names no files of its folder",
    ),
    "cut index": (
        lambda place, _: place.index.write_text('{"metadata": {}}') and None,
        r"index\.json is damaged",
    ),
    "in two files": (_in_both, r"has .* twice, in .*-00002-of-00002\.safetensors too"),
    "whole and in parts": (_whole_too, "holds weights twice, in "),
}


def _refuses_files(cell: tuple[Cell, State], spoil: FilesSpoil, message: str) -> None:
    place, state = cell
    spoil(place, state)
    with pytest.raises(UserError, match=message) as refused:
        place.load()
    assert str(place.folder) in str(refused.value)


@pytest.mark.parametrize("oddity", IN_FOLDERS)
@pytest.mark.parametrize("cell", FOLDERS, indirect=True, ids="-".join)
def test_files_that_nobody_would_read(oddity: str, cell: tuple[Cell, State]) -> None:
    _refuses_files(cell, *IN_FOLDERS[oddity])


@pytest.mark.parametrize("oddity", IN_SHARDS)
@pytest.mark.parametrize("cell", SHARDED, indirect=True, ids="-".join)
def test_files_that_contradict_their_index(oddity: str, cell: tuple[Cell, State]) -> None:
    _refuses_files(cell, *IN_SHARDS[oddity])


@pytest.mark.parametrize("cell", FOLDERS, indirect=True, ids="-".join)
def test_variants_are_left_alone(cell: tuple[Cell, State]) -> None:
    """Repositories have other precisions and formats beside; nobody asked for them."""
    place, _ = cell
    expected = place.load()
    save_file({"stale": torch.ones(1)}, place.folder / f"{place.stem}.fp16.safetensors")
    torch.save({"stale": torch.ones(1)}, place.folder / "pytorch_model.bin")
    found = place.load()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("cell", SHARDED, indirect=True, ids="-".join)
def test_an_index_alone_is_no_weights(cell: tuple[Cell, State], tmp_path: Path) -> None:
    """From the hub a machine that trains has every JSON file, and the weights of one expert."""
    place, _ = cell
    for number in (1, 2):
        place.shard(number).unlink()
    if not place.is_expert:
        assert place.digest(tmp_path / "memo") is None
    weights.check_component(WAN, place.model, place.component)
    with pytest.raises(UserError, match=f"lacks the weights of its {place.component}"):
        place.load()


def test_two_files_of_one_component(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    """Wan's file and ComfyUI's; two transformers in a folder without an index."""
    model = Path(shutil.copytree(models["wan21-i2v", True], tmp_path / "model"))
    torch_file = model / ORIGINAL_NAME["vae"]
    save_file(torch.load(torch_file, weights_only=True), model / COMFYUI_NAME["vae"])
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth and wan_2\.1_vae\.safetensors both are"):
        load(model, "vae", dtype=torch.float32)
    load(model, "transformer", dtype=torch.float32)  # ComfyUI's VAE is no part of it
    state: State = {}
    for file in model.glob("diffusion_*.safetensors"):
        state |= load_file(file)
    save_file(state, model / "wan_bf16.safetensors")
    with pytest.raises(UserError, match=r"has .* twice, in wan_bf16\.safetensors too"):
        load(model, "transformer", dtype=torch.float32)


def test_one_weight_under_two_names(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    """Wan's and diffusers' name for it, of which one would win."""
    model = Path(shutil.copytree(models["wan21-i2v", True], tmp_path / "model"))
    for component, own, other in (
        ("text_encoder", "norm.weight", "encoder.final_layer_norm.weight"),
        ("vae", "conv1.bias", "quant_conv.bias"),
        ("image_encoder", "visual.pre_norm.bias", "vision_model.pre_layrnorm.bias"),
        (  # a part of the fused one
            "image_encoder",
            "visual.transformer.0.attn.to_qkv.bias",
            "vision_model.encoder.layers.0.self_attn.k_proj.bias",
        ),
    ):
        file = model / ORIGINAL_NAME[component]
        state = torch.load(file, weights_only=True)
        torch.save(state | {other: state[own] + 1}, file)
        with pytest.raises(UserError, match=r"1 weights too many, .* under other names"):
            load(model, component, dtype=torch.float32)
        torch.save(state, file)
    file = model / "diffusion_pytorch_model-00001-of-00002.safetensors"
    state = load_file(file)
    other, name = "blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.weight"
    assert [*renamed({other: torch.ones(1)}, TRANSFORMER)] == [name]
    save_file(state | {other: torch.ones(32, 32)}, file)
    with pytest.raises(UserError, match=r"1 weights too many, .* under other names"):
        load(model, "transformer", dtype=torch.float32)


def test_two_embeddings_that_differ(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["t2v", False], tmp_path / "model"))
    file = model / "text_encoder/model.safetensors"
    state = load_file(file)
    tied = "encoder.embed_tokens.weight"
    save_file(state | {tied: state["shared.weight"] + 1}, file)
    with pytest.raises(UserError, match=f"two embeddings that differ, shared.weight and {tied}"):
        load(model, "text_encoder", dtype=torch.float32)
    expected = load(models["t2v", False], "text_encoder", dtype=torch.float32).state_dict()
    save_file({n: t for n, t in state.items() if n != "shared.weight"}
              | {tied: state["shared.weight"]}, file)  # fmt: skip
    found = load(model, "text_encoder", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
