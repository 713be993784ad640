"""LoRAs and what lies beside their file: peft's folders, against peft itself; indices."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from train.model.base import Base, base_digest, load_base
from train.model.lora_files import read_lora
from train.model.lora_source import ScaledLora

TARGETS = ["to_q", "to_k", "ffn.net.2"]
OUTSIDE = "proj_out"


def adapter(model: Path, folder: Path, **options: Any) -> Path:
    """A peft adapter with random matrices on the high-noise expert, as peft saves it."""
    base = WanTransformer3DModel.from_pretrained(model, subfolder="transformer")
    config = LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": TARGETS} | options))
    peft = get_peft_model(base, config)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    peft.save_pretrained(folder)
    return folder


def by_peft(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the expert into which peft merges what it reads from the folder."""
    base = WanTransformer3DModel.from_pretrained(model, subfolder="transformer")
    state = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    return dict(state)


def by_us(model: Path, path: Path) -> dict[str, torch.Tensor]:
    base = Base.parse(None, [str(path)])
    spec = read_model_spec(model)
    base.check(spec, "transformer")
    return load_base(
        spec, "high", precision="no", device=torch.device("cpu"), gradient_checkpointing=False,
        base=base,
    ).state_dict()  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"attn1.to_q": 3, r"blocks\.1\.attn2\.to_.": 5, "blocks.0.ffn.net.2": 7}},
        {"rank_pattern": {"to_k": 2, r"^blocks\.1\..*to_q": 6}, "alpha_pattern": {"to_q": 1}},
        {"use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 9}},
        {"lora_bias": True},
        {"target_modules": [*TARGETS, OUTSIDE, "patch_embedding"]},
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_strength_is_that_of_peft(options: dict[str, Any], tiny_t2v: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_t2v, tmp_path / "adapter", **options)
    expected = by_peft(tiny_t2v, folder)
    read = read_lora(folder)
    assert not read.alpha_assumed and read.note is None
    for path in (folder, folder / "adapter_model.safetensors"):
        found = by_us(tiny_t2v, path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    plain = WanTransformer3DModel.from_pretrained(tiny_t2v, subfolder="transformer").state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], expected[name])}
    assert changed == set(read.lora.changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"bias": "all"}, "it is a LoRA with whole weights that were trained, too"),
        ({"modules_to_save": ["proj_out"]}, "proj_out"),
        ({"init_lora_weights": "pissa"}, r"adapter_config\.json has init_lora_weights='pissa'"),
    ],
    ids=str,
)
def test_what_peft_saves_beside_pairs_is_refused(
    options: dict[str, Any], message: str, tiny_t2v: Path, tmp_path: Path
) -> None:
    folder = adapter(tiny_t2v, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=message):
        read_lora(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "lora_only"}, "has bias='lora_only', which is not read"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out=True"),
        ({"modules_to_save": ["head"]}, r"has modules_to_save=\['head'\]"),
        ({"use_dora": True}, "has use_dora=True"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"peft_type": "LOHA"}, "has peft_type='LOHA'"),
        ({"r": 8}, "have rank 4, .*adapter_config.json says 8"),
        ({"lora_alpha": float("nan")}, "is nan; expected a number"),
        ({"lora_alpha": 0}, "is 0; expected a number other than 0"),
        ({"lora_alpha": None}, "is None; expected a number"),
    ],
    ids=str,
)
def test_a_configuration_that_would_be_ignored_is_refused(
    changes: dict[str, Any], message: str, tiny_t2v: Path, tmp_path: Path
) -> None:
    folder = adapter(tiny_t2v, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        read_lora(folder)
    config.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        read_lora(folder)


def test_the_configuration_is_part_of_the_base(tiny_t2v: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_t2v, tmp_path / "adapter")

    def digest(path: Path) -> str:
        return base_digest(tiny_t2v, "transformer", Base.parse(None, [str(path)]))

    one = digest(folder)
    assert one == digest(folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 8}))
    assert digest(folder) != one


def test_another_file_in_the_folder_is_not_of_its_configuration(
    tiny_t2v: Path, tmp_path: Path
) -> None:
    folder = adapter(tiny_t2v, tmp_path / "adapter")
    other = shutil.copy(folder / "adapter_model.safetensors", folder / "other.safetensors")
    assert read_lora(Path(other)).alpha_assumed and not read_lora(folder).alpha_assumed


def test_a_folder_of_diffusers(tiny_t2v: Path, tmp_path: Path) -> None:
    source = adapter(tiny_t2v, tmp_path / "adapter")
    state = {
        name.replace("base_model.model.", "transformer."): tensor
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    (tmp_path / "diffusers").mkdir()
    config = {"transformer.r": 4, "transformer.lora_alpha": 16}
    save_file(
        state, tmp_path / "diffusers" / "pytorch_lora_weights.safetensors",
        {"lora_adapter_metadata": json.dumps(config)},
    )  # fmt: skip
    expected, found = (by_us(tiny_t2v, tmp_path / name) for name in ("adapter", "diffusers"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_which_file_of_a_folder(tiny_t2v: Path, tmp_path: Path) -> None:
    source = adapter(tiny_t2v, tmp_path / "adapter") / "adapter_model.safetensors"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled"):
        read_lora(folder)
    shutil.copy(source, folder / "mine.safetensors")
    assert read_lora(folder).lora.modules == read_lora(source).lora.modules
    shutil.copy(source, folder / "yours.safetensors")
    with pytest.raises(UserError, match=r"holds 2 of them: mine\.safetensors, yours\.safetensors"):
        read_lora(folder)


def test_several_files_by_their_index(tiny_t2v: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_t2v, tmp_path / "adapter")
    whole = by_us(tiny_t2v, folder)
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {key: names[place % 2] for place, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in (folder, index):
        found = by_us(tiny_t2v, path)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert ScaledLora(path=folder).digest == ScaledLora(path=index).digest
    with pytest.raises(UserError, match=r"00001-of-00002\S+ is one of the 2 files.*index\.json"):
        read_lora(folder / names[0])
    second = load_file(folder / names[1])
    lost = sorted(second)[-1]
    save_file({key: second[key] for key in second if key != lost}, folder / names[1])
    with pytest.raises(UserError, match=rf"lists {lost}, which is in its files nowhere"):
        read_lora(folder)
    save_file(second | {sorted(state)[0]: torch.ones(1)}, folder / names[1])
    with pytest.raises(
        UserError, match=rf"lists {sorted(state)[0]}, which is in its files 2 times"
    ):
        read_lora(folder)
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=rf"index\.json names {names[1]}, which is not in its"):
        read_lora(folder)
