"""`doctor` of both programs: on machines, models and data that are whole, and that are not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import preprocess.cli.app
import train.cli.app
from shared.cli.doctor import Finding, examine
from shared.errors import UserError
from shared.format.cache import open_cache
from shared.io.store import Store

ROOT = Path(__file__).parents[2]
APPS = {"wanprep": preprocess.cli.app.app, "wantrain": train.cli.app.app}


def doctor(program: str, *words: str | Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings."""
    ran = CliRunner().invoke(APPS[program], ["doctor", "--json", *map(str, words)])
    told = json.loads(ran.stdout)
    assert told["wrong"] == sum(one["verdict"] == "wrong" for one in told["findings"])
    assert ran.exit_code == (1 if told["wrong"] else 0), ran.output
    return ran.exit_code, told["findings"]


def wrong(found: list[dict[str, Any]]) -> list[str]:
    return [f"{one['check']}: {one['text']}" for one in found if one["verdict"] == "wrong"]


@pytest.fixture
def copied(tiny_t2v: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_t2v, tmp_path / "model"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_what_is_whole_is_said_to_be(copied: Path, t2v_shards: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    out = tmp_path / "not" / "there"
    code, found = doctor("wantrain", "--model", copied, "--shards", t2v_shards, "--output-dir", out)
    assert code == 0, wrong(found)
    assert files_of(tmp_path) == before and not out.exists()
    said = {one["check"]: one["text"] for one in found}
    assert {"python", "packages", "torch", "extras", "disk", "model", "shards"} <= said.keys()
    transformer = next(one["text"] for one in found if one["text"].startswith("transformer: "))
    stored = load_file(next((copied / "transformer").glob("*.safetensors")))
    assert f"1 file(s), {sum(t.nbytes for t in stored.values()) / 1e6:.1f} MB" in transformer
    assert f"{len(stored)} tensors, float32" in transformer
    assert said["shards"].endswith("are for this model (t2v)")


def truncated(model: Path) -> str:
    file = next((model / "transformer").glob("*.safetensors"))
    whole = file.stat().st_size
    os.truncate(file, whole - 100)
    return f"{file} has {whole - 100} bytes, its header needs {whole}. Delete it"


def cut_in_its_header(model: Path) -> str:
    file = next((model / "transformer").glob("*.safetensors"))
    os.truncate(file, 60)
    return f"{file} is cut short, within its header"


def without_an_expert(model: Path) -> str:
    next((model / "transformer_2").glob("*.safetensors")).unlink()
    return "transformer_2: its weights are not in"


def of_another_shape(model: Path) -> str:
    file = next((model / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["blocks.0.attn1.to_q.weight"]
    save_file(tensors, file)
    return "to_q.weight"


def without_configs(model: Path) -> str:
    (model / "model_index.json").unlink()
    return "has neither a model_index.json"


@pytest.mark.parametrize(
    "damage", [truncated, cut_in_its_header, without_an_expert, of_another_shape, without_configs]
)
def test_a_damaged_model_is_named(damage: Callable[[Path], str], copied: Path) -> None:
    expected = damage(copied)
    code, found = doctor("wantrain", "--model", copied)
    assert code == 1
    (line,) = wrong(found)
    assert line.startswith("model: ") and expected in line


def test_each_program_needs_its_own_parts(copied: Path) -> None:
    for folder in ("transformer", "transformer_2"):
        next((copied / folder).glob("*.safetensors")).unlink()
    code, found = doctor("wanprep", "--model", copied)
    assert code == 0, wrong(found)
    assert any("and not needed here" in one["text"] for one in found)
    next((copied / "vae").glob("*.safetensors")).unlink()
    code, found = doctor("wanprep", "--model", copied)
    assert code == 1 and "vae: its weights are not in" in wrong(found)[0]


def test_shards_that_do_not_fit_or_are_not_whole_are_named(
    tiny_t2v: Path, tiny_i2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    code, found = doctor("wantrain", "--model", tiny_i2v, "--shards", t2v_shards)
    (line,) = wrong(found)
    assert code == 1 and line.startswith("shards: ") and "wanprep" in line
    shards = Path(shutil.copytree(t2v_shards, tmp_path / "shards"))
    tar = shards / open_cache(Store(shards)).shards[0]
    os.truncate(tar, tar.stat().st_size - 512)
    lost = tmp_path / "nothing"
    code, found = doctor("wantrain", "--model", tiny_t2v, "--shards", shards, "--shards", lost)
    first, second = wrong(found)
    assert code == 1 and f"{tar} has {tar.stat().st_size} bytes, expected" in first
    assert "nothing" in second and "wanprep encode" in second


def test_media_that_would_be_rejected_are_named(
    tiny_t2v: Path, dataset: Path, tmp_path: Path
) -> None:
    media = Path(shutil.copytree(dataset, tmp_path / "media"))
    code, found = doctor("wanprep", "--model", tiny_t2v, "--train-data-dir", media)
    assert code == 0, wrong(found)
    assert any(one["text"].startswith("a clip of 5 frames") for one in found)
    assert found[-1]["text"] == "6 of the first 6 files can be read (6 in all)"
    (media / "clip1.mp4").write_bytes(b"no video")
    code, found = doctor("wanprep", "--model", tiny_t2v, "--train-data-dir", media)
    (line,) = wrong(found)
    assert code == 1 and line.startswith("dataset: clip1.mp4 would be rejected: ")
    assert found[-1]["text"] == "5 of the first 6 files can be read (6 in all)"
    code, found = doctor("wanprep", "--model", tiny_t2v, "--train-data-dir", tmp_path / "no")
    assert code == 1 and "no folder" in wrong(found)[-1]


def test_a_machine_without_torch_and_decoders_is_told_so(tmp_path: Path) -> None:
    """As a user without them: imports fail, and every other check is done."""
    for module in ("torch", "decord", "av"):
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('lib{module}.so is not here')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import wandistill_cli; wandistill_cli.wanprep()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--output", str(tmp_path / "o"), "--model", "toy"],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    lines = ran.stdout.splitlines()
    for check, library in (("gpu", "torch"), ("decoders", "av")):
        assert any(
            line.split()[:2] == ["wrong", check] and f"lib{library}.so is not here" in line
            for line in lines
        ), ran.stdout
    assert any(line.split()[:2] == ["ok", "disk"] for line in lines)
    assert lines[-1].endswith("checked") and not lines[-1].startswith("nothing")


def test_what_a_check_stumbles_over_is_a_finding_of_its_name() -> None:
    def of_users() -> list[Finding]:
        raise UserError("--x: found 1. Mend it.")

    def of_libraries() -> list[Finding]:
        raise OSError("lib.so: no such file\nand much more")

    first, second = examine([("one", of_users), ("two", of_libraries)])
    assert (first.check, first.verdict, first.text) == ("one", "wrong", "--x: found 1. Mend it.")
    assert second.text == "can't be checked: OSError: lib.so: no such file"


def test_a_folder_that_can_not_be_written_to_is_named(tiny_t2v: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, found = doctor(
        "wantrain", "--model", tiny_t2v, "--output-dir", tmp_path / "file" / "below"
    )
    assert code == 1 and "is a file, expected a folder" in wrong(found)[0]
