"""The arrows of the architecture: packages, folders, files; and who may touch an encoder."""

import ast
import re
import shutil
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders of each package, each of which may import those before it; "" is the package's top.
ORDER = {
    "shared": ("", "io", "models", "format", "cli"),
    "preprocess": (
        *("cache", "frames", "media", "dataset", "encode"),
        *("cluster", "inspection", "overlays", "verify", "cli"),
    ),
    "train": (
        *("functional", "data", "distributed", "model", "optim", "memory", "methods"),
        *("strategies", "saving", "sampling", "tracking", "", "bench", "cli"),
    ),
}
MODULES = {"shared": 39, "preprocess": 72, "train": 79}
MOST_FILES, MOST_LINES = 13, 600
ENCODERS = {"AutoencoderKLWan", "UMT5EncoderModel", "WanPipeline", "WanImageToVideoPipeline"}
MAY_BUILD_ENCODERS = {
    "preprocess/encode/encoders.py",
    "train/sampling/sample.py",
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


def _files(package: str, root: Path = ROOT) -> list[Path]:
    return sorted(f for f in (root / package).rglob("*.py") if f.name != "__init__.py")


def _arrows(package: str, root: Path) -> dict[str, set[str]]:
    """Module → those of its package that it imports; `folder.file` or, at the top, `file`."""
    modules = {
        ".".join(file.relative_to(root / package).with_suffix("").parts): file
        for file in _files(package, root)
    }
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for module, file in modules.items():
        for found, name in _imports(file):
            if found != package and not found.startswith(f"{package}."):
                continue
            inside = [".".join(found.split(".")[1:])]
            inside.append(f"{inside[0]}.{name}".strip("."))
            targets = [one for one in inside if one in modules]
            assert targets, f"{file}: {found} with {name} is no module"
            arrows[module].add(targets[-1])
    return arrows


def _folder(module: str) -> str:
    return module.rpartition(".")[0]


def _wrong(package: str, root: Path = ROOT) -> list[str]:
    """Arrows against the order of folders, and circles of files."""
    arrows, order = _arrows(package, root), ORDER[package]
    wrong = [
        f"{module} imports {other}"
        for module, others in arrows.items()
        for other in sorted(others)
        if order.index(_folder(other)) > order.index(_folder(module))
    ]
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        wrong.append(f"circle {' → '.join(error.args[1])}")
    return wrong


@pytest.mark.parametrize("package", ORDER)
def test_folders_import_those_below_them_and_files_make_no_circle(package: str) -> None:
    assert len(_files(package)) == MODULES[package]
    assert {_folder(module) for module in _arrows(package, ROOT)} == set(ORDER[package])
    assert _wrong(package) == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("train/data/batches.py", "from train.model.roles import Roles", ["data.batches imports"]),
        ("train/model/base.py", "def late():\n    import train.cli.app", ["model.base imports"]),
        (
            "shared/io/hashing.py",
            "if TYPE_CHECKING:\n    from shared.cli import support",
            ["io.hashing imports cli.support", "circle"],
        ),
        ("shared/io/durable.py", "from shared.io import mp4, mirror", ["circle"]),
        ("shared/errors.py", "from shared.io.names import quoted", [" imports io.names"]),
    ],
)
def test_a_wrong_import_is_seen(file: str, line: str, said: list[str], tmp_path: Path) -> None:
    package = file.split("/")[0]
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("toy"))
    changed = tmp_path / file
    changed.write_text(f"{changed.read_text()}\n{line}\n")
    found = "; ".join(_wrong(package, tmp_path))
    assert all(words in found for words in said), found


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
        assert not roots & never, file.name


@pytest.mark.parametrize("package", ORDER)
def test_rooms_are_of_a_size_to_be_seen_at_once(package: str) -> None:
    for init in (ROOT / package).rglob("__init__.py"):
        assert not init.read_text(), init  # or each decode worker would import what it imports
        assert len(list(init.parent.glob("*.py"))) - 1 <= MOST_FILES, init.parent
    for file in _files(package):
        assert len(file.read_text().splitlines()) <= MOST_LINES, file


def test_encoders_are_built_in_three_places_only() -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for package in ORDER
        for file in _files(package)
        if ENCODERS & {name for _, name in _imports(file)}
    }
    assert users == MAY_BUILD_ENCODERS


def test_media_are_opened_in_one_place_each() -> None:
    """What is shown is decided once: by `video` and `pictures`; decord only where it is right."""

    def users(root: str) -> set[str]:
        files = _files("preprocess")
        return {f.name for f in files if root in {m.split(".")[0] for m, _ in _imports(f)}}

    assert users("av") == {"video.py", "first_rule.py"}  # the latter for its names
    assert users("decord") == {"decord_pairs.py"}
    opens = {f.name for f in _files("preprocess") if "Image.open(" in f.read_text()}
    assert opens == {"pictures.py"}


def test_nothing_unpickles() -> None:
    for package in ORDER:
        for file in _files(package):
            source = file.read_text()
            calls = re.findall(r"(?<!safetensors\.)torch\.load\(([^()]*)\)", source)
            assert len(calls) == len(re.findall(r"(?<!safetensors\.)torch\.load\(", source))
            assert all("weights_only=True" in call for call in calls), file.name
            assert file.name == "weights.py" or not calls, file.name
            assert "import pickle" not in source, file.name
