"""docs/tutorial.md: the toy's commands run as they stand there, and print what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cli.config_command import configuration
from train.cli.app import app as wantrain

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```sh toy\n(.*?)```((?:(?!```|\n## |\n\*\*).)*)", PAGE, re.DOTALL)


@pytest.mark.long
def test_the_toy_from_clips_to_samples(tmp_path: Path) -> None:
    """Lines that the page shows are parts of lines that were printed."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": bin_first, "PYTHONPATH": str(ROOT)}
    assert len(BLOCKS) == 5
    for commands, below in BLOCKS:
        done = subprocess.run(
            ["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        for line in re.findall(r"(?m)^    (.+)$", below):
            assert line in said, line
    for file in re.findall(r"`(toy-\S+png)`", PAGE):
        assert (tmp_path / file).exists(), file
    assert len(list((tmp_path / "toy-samples").glob("*.mp4"))) == 1


def test_options_of_the_large_runs_are_there() -> None:
    """Each `wantrain` command of the page is one that can be typed."""
    commands = re.findall(r"(?m)^(wantrain (?:lora|distill) (?:.*\\\n)*.*)$", PAGE)
    assert len(commands) == 6
    for command in commands:
        words = command.replace("\\\n", " ").split()[1:]
        given = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        expected = (None,) if "--model toy" in command else ("both", "high")
        assert configuration(wantrain, given).boundary_type in expected
