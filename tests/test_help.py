"""`--help` of every command: complete, uncut, cheap, and its toy examples run."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.core import TyperGroup, TyperOption
from typer.testing import CliRunner

import preprocess.cli.app
import train.cli.app
from shared.cli.videox_fun_command import GIVEN

ROOT = Path(__file__).parents[1]
APPS = {"wanprep": preprocess.cli.app.app, "wantrain": train.cli.app.app}
COMMANDS = [
    (program, command.name or command.callback.__name__)
    for program, app in APPS.items()
    for command in app.registered_commands
    if command.callback is not None
]
PAGES = [(program, "") for program in APPS] + COMMANDS

# The arguments of the seed document's shell blocks, as they are written there, and what it names
# beside them. Both commands take all of it: shared/cli/videox_fun_flags.py.
SEED_BLOCK = """
  --config_path="config/wan2.2/wan_civitai_i2v.yaml"
  --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.2-I2V-A14B
  --train_data_dir=datasets/internal_datasets/
  --train_data_meta=datasets/internal_datasets/metadata.json
  --image_sample_size=640 --video_sample_size=640 --token_sample_size=640
  --video_sample_stride=2 --video_sample_n_frames=81
  --train_batch_size=1 --video_repeat=1 --gradient_accumulation_steps=1
  --dataloader_num_workers=8 --num_train_epochs=100 --checkpointing_steps=50
  --learning_rate=1e-05 --learning_rate_critic=1e-06 --seed=42
  --output_dir="output_dir_distill" --gradient_checkpointing --mixed_precision="bf16"
  --adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05
  --random_hw_adapt --training_with_video_token_length --enable_bucket --uniform_sampling
  --boundary_type="low" --train_mode="i2v"
  --rank=64 --network_alpha=32 --target_name="q,k,v,ffn.0,ffn.2" --use_peft_lora --low_vram
  --random_frame_crop --resume_from_checkpoint="latest"
"""


def group_of(program: str) -> TyperGroup:
    group = typer.main.get_command(APPS[program])
    assert isinstance(group, TyperGroup)
    return group


def command_of(program: str, name: str) -> Any:
    return group_of(program).commands[name]


def options_of(program: str, name: str) -> list[TyperOption]:
    shown = [p for p in command_of(program, name).params if p.name != "help" and not p.hidden]
    assert shown
    return shown


def function_of(program: str, name: str) -> Callable[..., None]:
    (found,) = (
        command.callback
        for command in APPS[program].registered_commands
        if command.callback is not None and name in (command.name, command.callback.__name__)
    )
    return found


def run(*words: str, cwd: Path, **environment: str) -> str:
    """Type a command of this environment; its stdout."""
    executable = str(Path(sys.executable).with_name(words[0]))
    ran = subprocess.run(
        [executable, *words[1:]],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@cache
def page_of(program: str, name: str, columns: int) -> str:
    """What a terminal of that width shows; typer's CliRunner has a width of its own."""
    return run(program, *name.split(), "--help", cwd=ROOT, COLUMNS=str(columns))


def sections(page: str) -> dict[str, str]:
    """The page's text below each heading."""
    parts = re.split(r"(?m)^(\S.*):$\n", page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def examples(program: str, name: str) -> list[list[list[str]]]:
    """Command lines of each example, as words; read off the page as a reader would."""
    text = sections(page_of(program, name, 80))["Examples"].replace("\\\n", " ")
    blocks = [
        [shlex.split(line) for line in block.splitlines() if not line.strip().startswith("#")]
        for block in text.strip().split("\n\n")
    ]
    assert all(blocks)
    return blocks


def parse(program: str, name: str, words: list[str]) -> dict[str, Any]:
    """Options and flags that are another command's, as given; raises for what can't be parsed."""
    group = group_of(program).make_context(program, [name])
    context = command_of(program, name).make_context(name, list(words), parent=group)
    given = {f: v[0] if v else True for f, v in context.meta.get(GIVEN, {}).items()}
    return context.params | given


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("program", "name"), PAGES)
def test_a_page_fits_its_terminal(program: str, name: str, columns: int) -> None:
    page = page_of(program, name, columns)
    assert max(map(len, page.splitlines())) <= columns
    assert "..." not in page.replace("[ARGS]...", "")  # nothing is cut off
    assert not re.search(r"(?m)\S-$", page), "a name is broken at its dash: change the wording"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_option_stands_in_its_group_with_help_and_default(
    program: str, name: str, columns: int
) -> None:
    found = sections(page_of(program, name, columns))
    context = command_of(program, name).make_context(name, [], resilient_parsing=True)
    for option in options_of(program, name):
        assert option.help and re.fullmatch(r"[^\n]*[^.]\.", option.help), option.name
        assert "default" not in option.help.lower(), "show_default says it, for all alike"
        assert isinstance(option.rich_help_panel, str), option.name
        section = " ".join(found[option.rich_help_panel].split())
        names, described = option.get_help_record(context) or ("", "")
        assert f" {names} {' '.join(described.split())}" in f" {section}"
        assert re.search(r"default: .+\]|required\]", described), option.name
        for envvar in [option.envvar] if isinstance(option.envvar, str) else []:
            assert f"env var: {envvar}" in described
        assert not re.search(r"<(str|int|float|path|list.*)>", names), "give it a metavar"


@pytest.mark.parametrize(("program", "name"), PAGES)
def test_a_page_has_examples_that_parse(program: str, name: str) -> None:
    blocks = examples(program, name)
    assert len(blocks) >= 2
    for command in [words for block in blocks for words in block if words[0] in APPS]:
        assert command[1] in group_of(command[0]).commands
        if command[2:] != ["--help"]:
            assert parse(command[0], command[1], command[2:])
    if name:
        assert blocks[0][0][:2] == [program, name]
        assert "toy" in " ".join(blocks[-1][-1])


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_a_page_says_what_comes_next(program: str, name: str) -> None:
    assert re.search(r"(?m)^  Next: ", page_of(program, name, 80))


@pytest.mark.parametrize(
    ("program", "name"), [("wanprep", "encode"), ("wanprep", "plan"), ("wantrain", "distill")]
)
def test_flags_of_the_seed_document_are_taken_as_written(program: str, name: str) -> None:
    words = shlex.split(SEED_BLOCK)
    taken = parse(program, name, words)
    for word in words:
        flag, _, text = word.removeprefix("--").partition("=")
        value = taken["model" if flag.startswith("pretrained") else flag]
        same = {bool: bool, int: int, float: float, str: str}.get(type(value), Path)
        assert value == same(text or "yes"), flag


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_a_wrong_choice_is_answered_with_the_choices(program: str, name: str, columns: int) -> None:
    hints = get_type_hints(function_of(program, name))
    for option in options_of(program, name):
        found = re.search(r"Literal\[(.*?)\]", str(hints.get(option.name or "")))
        if found is None:
            continue
        ran = CliRunner().invoke(APPS[program], [name, option.opts[0], "no-such"])
        assert ran.exit_code == 2
        choices = found[1].replace("_", "-")  # either is taken
        assert f"is not one of {choices}" in ran.output


@pytest.mark.parametrize(
    ("program", "typed", "meant"),
    [
        ("wanprep", ["encode", "--train_data_dri", "x"], "--train-data-dir"),
        ("wantrain", ["distill", "--boundry_type", "low"], "--boundary-type"),
        ("wantrain", ["sample", "--promt", "x"], "--prompt"),
        ("wantrain", ["sampel"], "Did you mean 'sample'?"),
    ],
)
def test_a_typo_is_answered_with_the_name(program: str, typed: list[str], meant: str) -> None:
    ran = CliRunner().invoke(APPS[program], typed)
    assert ran.exit_code == 2
    assert meant in ran.output.split("Error: ")[1]


def test_what_is_missing_is_named_and_an_example_shown() -> None:
    ran = CliRunner().invoke(APPS["wantrain"], ["sample"], prog_name="wantrain")
    assert ran.exit_code == 2
    assert "Missing option '--prompt'." in ran.output
    (shown,) = re.findall(r"(?m)^  (wantrain sample .*)$", ran.output)
    assert [shlex.split(shown)] == examples("wantrain", "sample")[0]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from preprocess.cli.app import app as wanprep\n"
        "from train.cli.app import app as wantrain\n"
        f"for program, name in {PAGES}:\n"
        "    app = {'wanprep': wanprep, 'wantrain': wantrain}[program]\n"
        "    assert CliRunner().invoke(app, [*name.split(), '--help']).exit_code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'zarr', 'decord'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_options_of_encode_are_checked_before_torch_is_loaded() -> None:
    program = "import sys, preprocess.encode.config; print({'torch', 'zarr'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr


@pytest.mark.long
def test_the_toy_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: nineteen commands that each import torch and diffusers are minutes."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    for program, name in COMMANDS:  # encode, index, …, distill, sample
        for program_or_python, *arguments in examples(program, name)[-1]:
            if program_or_python in APPS:
                APPS[program_or_python](arguments, standalone_mode=False)
            else:
                run(program_or_python, *arguments, cwd=tmp_path)
    assert (tmp_path / "toy-lora" / "lora-full-diffusers.safetensors").exists()
    assert (tmp_path / "toy-samples" / "student-000.mp4").exists()
