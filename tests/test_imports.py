"""The arrows of the architecture (pyproject.toml has them), and who may touch an encoder."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "preprocess", "train")
MODULES = {"shared": 70, "preprocess": 70, "train": 145}
MOST_FILES, MOST_LINES = 15, 600
BUILDERS = {"load_component", "load_class"}
MAY_BUILD = {
    "shared/models/family.py",
    "shared/models/weights.py",
    "train/bench/flops.py",
    "train/model/base.py",
    "train/model/custom_weights.py",
    "preprocess/encode/encoders.py",
    "train/sampling/pipeline.py",
    "train/sampling/decode.py",
}


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: names of modules are whole here"
            yield from ((node.module or "", alias.name) for alias in node.names)


def _files(package: str) -> list[Path]:
    return sorted(f for f in (ROOT / package).rglob("*.py") if f.name != "__init__.py")


def lint(root: Path) -> tuple[int, str]:
    """Exit code and output of import-linter with the contracts of pyproject.toml."""
    ran = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_contracts_are_kept_and_see_every_module() -> None:
    code, said = lint(ROOT)
    assert code == 0, said
    folders = sum(len(list((ROOT / package).rglob("__init__.py"))) for package in PACKAGES)
    found = {package: len(_files(package)) for package in PACKAGES}
    assert found == MODULES
    assert f"Analyzed {sum(MODULES.values()) + folders} files" in said


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("train/data/batches.py", "from train.model.roles import Roles", "folders of train"),
        ("train/model/base.py", "def late():\n    import train.cli.app", "folders of train"),
        ("train/run.py", "from train.bench.flops import count", "folders of train"),
        ("train/config.py", "from train.loop import train", "folders of train"),
        ("train/utils.py", "X = 1", "folders of train"),
        (
            "preprocess/media/reader.py",
            "if TYPE_CHECKING:\n    from preprocess.cli import app",
            "folders of preprocess",
        ),
        ("shared/errors.py", "from shared.io.names import quoted", "folders of shared"),
        ("shared/io/durable.py", "from shared.io import mp4, mirror", "no circles of files"),
        ("preprocess/frames/video.py", "from shared.cli import support", "prints nothing"),
        ("preprocess/encode/run.py", "from train.functional import rng", "preprocess → shared"),
        ("shared/io/mp4.py", "from train.functional import rng", "preprocess → shared"),
    ],
)
def test_a_wrong_import_is_seen(file: str, line: str, broken: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("toy"))
    changed = tmp_path / file
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    code, said = lint(tmp_path)
    assert code == 1
    assert re.search(rf"{broken}.* BROKEN", said), said


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("preprocess", {"train"}),
        ("train", {"preprocess", "decord", "av"}),
        ("shared", {"preprocess", "train", "decord", "av", "diffusers", "transformers", "peft"}),
    ],
)
def test_packages_keep_their_distance(package: str, never: set[str]) -> None:
    for file in _files(package):
        roots = {
            module.split(".")[0]
            for module, name in _imports(file)
            # Conversions of names, no models; needed to know a component in Wan's original layout.
            if not (module == "diffusers.loaders.single_file_utils" and name.startswith("convert_"))
        }
        not_installed = {"tests", "benchmarks", "scripts", "wandistill_cli"}
        assert not roots & (never | not_installed), file.name


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_of_a_size_to_be_seen_at_once(package: str) -> None:
    for init in (ROOT / package).rglob("__init__.py"):
        assert not init.read_text(), init  # or each decode worker would import what it imports
        assert len(list(init.parent.glob("*.py"))) - 1 <= MOST_FILES, init.parent
    for file in _files(package):
        assert len(file.read_text().splitlines()) <= MOST_LINES, file


def test_networks_are_built_in_few_places_only() -> None:
    """From a family's classes; of those outside `shared` and `model`, three build encoders."""
    users = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in _files(package)
        if any(name in file.read_text() for name in BUILDERS)
    }
    assert users == MAY_BUILD


def test_media_are_opened_in_one_place_each() -> None:
    """What is shown is decided once: by `video` and `stills`; decord only where it is right."""

    def users(root: str) -> set[str]:
        files = _files("preprocess")
        return {f.name for f in files if root in {m.split(".")[0] for m, _ in _imports(f)}}

    assert users("av") == {"video.py", "first_rule.py"}  # the latter for its names
    assert users("decord") == {"decord_pairs.py"}
    every = [file for package in PACKAGES for file in _files(package)]
    assert {f.name for f in every if "Image.open(" in f.read_text()} == {"stills.py"}


def test_nothing_unpickles() -> None:
    for package in PACKAGES:
        for file in _files(package):
            source = file.read_text()
            calls = re.findall(r"(?<!safetensors\.)torch\.load\(([^()]*)\)", source)
            assert len(calls) == len(re.findall(r"(?<!safetensors\.)torch\.load\(", source))
            assert all("weights_only=True" in call for call in calls), file.name
            assert file.name == "weights.py" or not calls, file.name
            assert "import pickle" not in source, file.name
