"""The arrows of the architecture: preprocess → shared ← train, and who may touch an encoder."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENCODERS = {"AutoencoderKLWan", "UMT5EncoderModel", "WanPipeline", "WanImageToVideoPipeline"}
MAY_BUILD_ENCODERS = {
    "preprocess/encode/encoders.py",
    "train/sampling/sample.py",
    "train/sampling/decode.py",
}


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def _files(package: str) -> list[Path]:
    found = sorted((ROOT / package).glob("*.py"))
    assert len(found) > 3
    return found


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


def test_encoders_are_built_in_three_places_only() -> None:
    users = {
        f"{package}/{file.name}"
        for package in ("preprocess", "train", "shared")
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
    for package in ("preprocess", "train", "shared"):
        for file in _files(package):
            source = file.read_text()
            calls = re.findall(r"(?<!safetensors\.)torch\.load\(([^()]*)\)", source)
            assert len(calls) == len(re.findall(r"(?<!safetensors\.)torch\.load\(", source))
            assert all("weights_only=True" in call for call in calls), file.name
            assert file.name == "weights.py" or not calls, file.name
            assert "import pickle" not in source, file.name
