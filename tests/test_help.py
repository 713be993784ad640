"""`--help` of every command: complete, uncut, cheap, and its toy examples run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from preprocess.cli import app as wanprep
from train.cli import app as wantrain

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "wanprep": typer.main.get_command(wanprep),
    "wantrain": typer.main.get_command(wantrain),
}
COMMANDS = [
    (program, name)
    for program, group in PROGRAMS.items()
    for name in group.commands  # type: ignore[attr-defined]
]


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    executable = Path(sys.executable).with_name(str(command[0]))
    return subprocess.run(
        [str(executable), *map(str, command[1:])], cwd=cwd, capture_output=True, text=True
    )


def options_of(program: str, name: str) -> list[typer.core.TyperOption]:
    command = PROGRAMS[program].commands[name]  # type: ignore[attr-defined]
    return [p for p in command.params if p.name != "help"]


def examples(program: str, name: str) -> list[list[str]]:
    """The example commands, as argument lists."""
    text = PROGRAMS[program].commands[name].epilog  # type: ignore[attr-defined]
    lines = [x for x in text.replace("\\\n", " ").splitlines() if x and not x.startswith("#")]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("columns", ["80", "140"])
@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_option_stands_whole_in_its_group_with_help_and_default(
    program: str, name: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ran = run(program, name, "--help")
    assert ran.returncode == 0, ran.stderr
    assert "…" not in ran.stdout.replace("cpu …", "")  # nothing is cut off
    assert ran.stdout.index("Examples:") < ran.stdout.index("Other:")
    page = " ".join(ran.stdout.split())
    for option in options_of(program, name):
        assert option.help and option.help.rstrip()[-1] in ".…", option.name
        assert option.rich_help_panel and f"{option.rich_help_panel}:" in ran.stdout
        assert " ".join(option.help.split()) in page.replace("- ", "-") or columns == "80"
        for spelling in option.opts:
            assert re.search(rf"(?<!\S){spelling}(?![\w-])", ran.stdout), spelling
        told = option.required or option.is_flag or option.show_default is not False
        assert told and (option.default is not None or option.required or option.show_default)


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_examples_use_options_that_exist(program: str, name: str) -> None:
    found = examples(program, name)
    assert found
    known = {
        o for option in options_of(program, name) for o in (*option.opts, *option.secondary_opts)
    }
    for command in found:
        assert command[:2] == [program, name]
        assert {word for word in command if word.startswith("--")} <= known


def test_help_imports_neither_torch_nor_diffusers() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from preprocess.cli import app as a\n"
        "from train.cli import app as b\n"
        "for app, name in ((a, 'encode'), (b, 'distill'), (b, 'sample')):\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'zarr', 'decord'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.long
def test_the_toy_examples_run_one_after_the_other(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts/render_clips.py"),
            "--count",
            "4",
            "--output",
            "datasets",
        ],
        cwd=tmp_path,
        check=True,
    )
    for program, name in (("wanprep", "encode"), ("wantrain", "distill"), ("wantrain", "sample")):
        (command,) = [words for words in examples(program, name) if "toy" in words]
        ran = run(*command, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "output_dir_distill" / "lora-low-diffusers.safetensors").exists()
    assert (tmp_path / "samples" / "teacher-000.mp4").exists()
