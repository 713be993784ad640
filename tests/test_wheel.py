"""What is published: a wheel, installed where no repository is, does the main job on the toy."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MEDIA = ROOT / "tests" / "old_caches" / "d0f92fe" / "media"
BUILT_OF = ("pyproject.toml", "README.md", "LICENSE", "wandistill_cli.py")
PACKAGES = ("preprocess", "shared", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy: setuptools leaves folders in its source."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_OF:
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    out = source / "dist"
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (made,) = out.glob("wandistill-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `bin` of an environment that has the wheel, and our dependencies but not the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    # Of an added folder Python reads no .pth files, such as that of an editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip("--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    yield environment / "bin"
    shutil.rmtree(environment)


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_building_needs_nothing_but_setuptools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == ["setuptools>=77"]


def test_all_files_of_the_packages_are_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert len(ours) > 200
    assert ours <= packed


@pytest.mark.long
def test_a_lora_of_the_toy_is_made_far_from_the_repository(installed: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(program: str, words: str) -> str:
        ran = subprocess.run(
            [str(installed / program), *words.split()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    (tmp_path / "where.py").write_text("import train.loop; print(train.loop.__file__)")
    assert run("python", "where.py").startswith(str(installed.parent))

    (tmp_path / "clips").mkdir()
    for name in ("h264", "vp9"):
        for file in MEDIA.glob(f"{name}.*"):
            shutil.copy(file, tmp_path / "clips")
    run(
        "wanprep",
        "encode --model toy --train-data-dir clips --size 64 --video-sample-n-frames 17 "
        "--video-sample-stride 1 --num-workers 1 --output shards",
    )
    run("wanprep", "inspect --shards shards --html shards.html")
    assert "<svg" in (tmp_path / "shards.html").read_text()
    distill = (
        "distill --model toy --shards shards --output-dir lora --boundary-type full "
        "--max-train-steps 1 --train-batch-size 2 --rank 8 --mixed-precision no "
    )
    run("wantrain", f"{distill} --strategy zero2 --num-processes 1 --dry-run")  # launch_configs/
    run("wantrain", distill)
    run(
        "wantrain",
        "sample --model toy --lora lora/lora-full-diffusers.safetensors --prompt cat --height 64 "
        "--width 64 --num-frames 17 --dtype fp32 --output clips.out",
    )
    made = {file.suffix for file in (tmp_path / "clips.out").iterdir()}
    assert ".mp4" in made
