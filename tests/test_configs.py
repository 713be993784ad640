"""The run files that ship: each fits the memory that it names, and starts what it is for."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from preprocess.cli.app import app as wanprep
from shared.cli.config_command import configuration
from shared.format.buckets import BASE_BUCKETS, scaled_size
from shared.io.toml_file import read_toml
from tests.models import tiny_model
from tests.train.conftest import encode, write_dataset
from train.cli.app import app as wantrain

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*/*.toml"))
NAMES = [f"{file.parent.name}/{file.stem}" for file in FILES]
# GiB that drivers report, of the smallest card of a kind (of 48 GB: L40S).
ROOM = {"24gb": 23.5, "48gb": 44.5, "80gb": 79, "8x80gb": 79}
KINDS: dict[str, Any] = {
    "wan2.2-i2v-a14b": ("i2v", True),
    "wan2.2-t2v-a14b": ("t2v", True),
    "wan2.2-ti2v-5b": ("ti2v", False),
    "wan2.1-t2v-1.3b": ("t2v", False),
}
# Of a run's options, those by which memory is planned.
PLANNED = {
    "low_vram", "activation_offloading", "num_processes", "strategy", "train_batch_size"
}  # fmt: skip


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    wantrain(["plan", *words, "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_there_is_one_for_each_model_and_card() -> None:
    assert set(NAMES) == {f"{model}/{card}" for model in KINDS for card in ROOM}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_fits_the_memory_that_it_names(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in it gives the numbers in it; the bucket with the most pixels fits, too."""
    text, tables = file.read_text(), read_toml(file)
    (command,) = re.findall(r"\n#     wantrain (plan .*)\n", text)
    room = ("--gpu-memory", str(ROOM[file.stem]))
    asked = planned(capsys, *shlex.split(command)[1:], *room)
    assert asked["fits"] == []
    gpu, host = (asked["choices"][0][part] / 2**30 for part in ("total", "host"))
    assert f"{gpu:.1f} GiB of GPU memory" in text
    assert (f"{host:.1f} GiB of CPU memory" in text) == (host > 0)
    config = configuration(wantrain, shlex.split(command))
    options = tables["distill"].keys() - {"model", "shards", "boundary_type", "max_train_steps"}
    assert options <= PLANNED
    for name in options:
        assert getattr(config, name) == tables["distill"][name] == tables["lora"][name]

    if file.stem != "24gb":  # the tightest
        return
    clips = tables["encode"]
    multiple = 32 if file.parent.name == "wan2.2-ti2v-5b" else 16
    sizes = (scaled_size(base, clips["size"], multiple) for base in BASE_BUCKETS)
    height, width = max(sizes, key=lambda size: (size[0] * size[1], size))
    frames = str(clips["video_sample_n_frames"])
    largest = ("--fix-sample-size", str(height), str(width), "--frames", frames)
    assert planned(capsys, *shlex.split(command)[1:], *largest, *room)["fits"] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A small model of each kind, and shards for it."""
    folder = tmp_path_factory.mktemp("small")
    dataset = write_dataset(folder / "clips", clips=3, image=False)
    found = {}
    for name, (mode, two_experts) in KINDS.items():
        model = tiny_model(folder / name, mode, two_experts=two_experts)
        found[name] = (model, encode(dataset, model, folder / f"{name}-shards"))
    return found


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_runs_begin_with_it(
    file: Path,
    small: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dry run of each command with a small model of the same kind in place of the large one."""
    model, shards = small[file.parent.name]
    out = tmp_path / "out"
    instead = ("--model", model, "--shards", shards, "--output-dir", out, "--device", "cpu")
    for command in ("distill", "lora"):
        words = [command, "--config", file, *instead, "--dry-run"]
        wantrain([str(word) for word in words], standalone_mode=False)
        said = capsys.readouterr().out
        assert said.count("\nlength   --max-train-steps: ") == (
            2 if KINDS[file.parent.name][1] else 1
        )
    config = configuration(wanprep, ["encode", "--config", str(file)])
    assert config.model == read_toml(file)["lora"]["model"]
