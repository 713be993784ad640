"""Shell files of VideoX-Fun: every flag has its place, and the page's commands do their job."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import preprocess.cli.app
import train.cli.app
from shared.cli.videox_fun_command import ENCODE, TRAIN, flag_report
from shared.cli.videox_fun_flags import VIDEOX_FUN_FLAGS
from shared.errors import UserError
from tests.models import tiny_model
from tests.test_help import group_of, options_of
from tests.train.conftest import write_dataset

PAGE = (Path(__file__).parents[1] / "docs" / "from-videox-fun.md").read_text()
MODEL = "models/Diffusion_Transformer/Wan2.2-I2V-A14B"
DATA = "datasets/internal_datasets"


def blocks(kind: str) -> list[str]:
    """Shell blocks of the page, as they stand."""
    found = re.findall(rf"```sh {kind}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found


def own_options(program: str, name: str) -> set[str]:
    return {
        spelling.removeprefix("--").replace("-", "_")
        for option in options_of(program, name)
        for spelling in option.opts
    }


def test_every_flag_is_where_it_is_said_to_be() -> None:
    own = {ENCODE: own_options("wanprep", "encode"), TRAIN: own_options("wantrain", "distill")}
    assert len({flag.name for flag in VIDEOX_FUN_FLAGS}) == len(VIDEOX_FUN_FLAGS) == 92
    for flag in VIDEOX_FUN_FLAGS:
        owners = [command for command in own if flag.name in own[command]]
        assert bool(flag.reason) != bool(owners)


@pytest.mark.parametrize(
    ("words", "elsewhere"),
    [
        (["wanprep", "encode"], {"rank": TRAIN}),
        (["wanprep", "plan"], {"gen_update_interval": TRAIN}),
        (["wantrain", "distill"], {"fix_sample_size": ENCODE, "video_sample_stride": ENCODE}),
        (["wantrain", "lora"], {"train_data_dir": ENCODE, "fake_guidance_scale": TRAIN}),
    ],
)
def test_a_flag_is_said_to_be_of_the_command_that_has_it(
    words: list[str], elsewhere: dict[str, str]
) -> None:
    program = group_of(words[0])
    said = flag_report({name: ("1",) for name in elsewhere}, program)
    expected: dict[str, list[str]] = {}
    for flag in VIDEOX_FUN_FLAGS:
        if flag.name in elsewhere:
            expected.setdefault(elsewhere[flag.name], []).append(flag.option)
    assert sorted(said) == sorted(
        f"flags    for {owner}, ignored here: {', '.join(names)}"
        for owner, names in expected.items()
    )


def test_the_page_has_every_flag_once_with_its_place() -> None:
    own = {ENCODE: own_options("wanprep", "encode"), TRAIN: own_options("wantrain", "distill")}
    table = PAGE.split("## All flags")[1]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    places = {
        name: (here, why) for names, here, why in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert len(places) == sum(len(re.findall(r"`(\w+)`", names)) for names, _, _ in rows)
    assert places.keys() == {flag.name for flag in VIDEOX_FUN_FLAGS}
    for flag in VIDEOX_FUN_FLAGS:
        here, why = (text.strip() for text in places[flag.name])
        if not flag.reason:
            owners = [command for command in own if flag.name in own[command]]
            assert here == ("both" if len(owners) == 2 else f"`{owners[0]}`"), flag.name
        else:
            assert (here, why) == ("refused" if flag.refused else "not needed", flag.reason)


@pytest.mark.parametrize(
    "flag", [f for f in VIDEOX_FUN_FLAGS if f.refused], ids=lambda flag: flag.name
)
@pytest.mark.parametrize("program", [ENCODE, TRAIN])
def test_what_would_change_the_lora_is_refused_not_ignored(flag, program: str) -> None:  # type: ignore[no-untyped-def]
    app = {ENCODE: preprocess.cli.app.app, TRAIN: train.cli.app.app}[program]
    values = ["x"] * int(flag.values)
    ran = CliRunner().invoke(app, [program.split()[1], f"--{flag.name}", *values])
    assert isinstance(ran.exception, UserError)
    assert str(ran.exception).startswith(f"{flag.option}: not supported: {flag.reason}")
    if flag.same_as:
        assert flag_report({flag.name: (flag.same_as,)}, group_of(program.split()[0])) == []


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user of VideoX-Fun has it, with small weights and one short clip, encoded."""
    folder = tmp_path_factory.mktemp("user")
    tiny_model(folder / MODEL, "i2v", patch_size=(1, 4, 4))
    write_dataset(folder / DATA, clips=1, image=False)
    entry = {"file_path": "clip0.mp4", "text": "waves", "type": "video"}
    (folder / DATA / "metadata.json").write_text(json.dumps([entry]))
    said = shell(folder, blocks("setup")[0] + blocks("encode")[0])
    assert "832x480, 5 frames: 1" in said.stdout
    assert "for wantrain distill, ignored here: --output-dir, " in said.stderr
    assert "--config-path (read from the model's own" in said.stderr
    return folder


def shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, in their folder, with our commands on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.mark.long
@pytest.mark.parametrize(
    "script", dict.fromkeys(blocks("train")), ids=lambda script: script.strip()[-40:]
)
def test_the_pages_commands_train_a_lora(user: Path, tmp_path: Path, script: str) -> None:
    for name in ("models", "datasets", "shards"):
        (tmp_path / name).symlink_to(user / name)
    said = shell(tmp_path, blocks("setup")[0] + script)
    assert "for wanprep encode, ignored here: --train-data-dir, " in said.stderr
    assert "--use-peft-lora (the LoRA is always peft's)" in said.stderr
    weights = load_file(tmp_path / "output_dir_distill" / "lora-low-diffusers.safetensors")
    rank = 128 if "--rank=128" in script else 64
    assert {t.shape[0] for name, t in weights.items() if "lora_A" in name} == {rank}
    assert ("transformer.blocks.0.attn1.to_out.0.lora_A.weight" in weights) == (rank == 128)
    assert all(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)


def test_the_page_shows_the_documents_five_launches() -> None:
    theirs = blocks("theirs")
    marks = ["--mixed_precision", "zero_stage2", "--zero_stage 3", "--use_fsdp", "MASTER_ADDR"]
    assert len(theirs) == len(marks)
    for launch, mark in zip(theirs, marks, strict=True):
        assert mark in launch and 'scripts/wan2.2/train_distill_lora.py "${flags[@]}"' in launch
