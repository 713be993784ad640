"""The commands of docs/launch.md, as they stand there, with two processes on this machine's CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.foreign_names import foreign_names
from tests.train.strategies.test_strategies import apart

ROOT = Path(__file__).parents[3]
BLOCKS = dict(re.findall(r"```sh (\S+)\n(.*?)```", (ROOT / "docs/launch.md").read_text(), re.S))
ONE, MACHINES = "single", "machines"
# What `accelerate config` writes on a machine with GPUs. Told of none, `accelerate launch` starts
# one process whatever it is asked for; the processes find out by themselves that there are none.
CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: false\n"


@pytest.fixture(scope="module")
def place(tiny_i2v: Path, i2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: shards in it, accelerate's config."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "shards").symlink_to(i2v_shards)
    (folder / "hf" / "accelerate").mkdir(parents=True)
    (folder / "hf" / "accelerate" / "default_config.yaml").write_text(CONFIG)
    return folder


def typed(block: str, folder: Path, model: Path, **replaced: str) -> "subprocess.Popen[str]":
    """Start a block in a shell, in a folder of its own, where modules are called as ours; values of
    its exports replaced."""
    text = BLOCKS["setup"] + BLOCKS[block]
    for name, value in replaced.items():
        text, found = re.subn(rf"export {name}=\S+", f"export {name}={value}", text)
        assert found, name
    if not (folder / block).exists():
        foreign_names(folder / block)
        (folder / block / "shards").symlink_to((folder / "shards").resolve())
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MODEL_NAME": str(model),
        "HOME": os.environ["HOME"],
    }
    return subprocess.Popen(
        ["bash", "-ec", text],
        cwd=folder / block,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def of_one(place: Path, tiny_i2v: Path) -> Path:
    """The run of one process; half of the updates' samples."""
    ended(typed(ONE, place, tiny_i2v, NUM_PROCESS="1", STEPS="1"))
    return place / ONE / "output_dir_distill" / "low"


@pytest.mark.long
@pytest.mark.parametrize("block", sorted(BLOCKS.keys() - {"setup", ONE, MACHINES}))
def test_a_command_runs_as_it_stands(of_one: Path, place: Path, tiny_i2v: Path, block: str) -> None:
    said = ended(typed(block, place, tiny_i2v, NUM_PROCESS="2", STEPS="1"))
    strategy = block.removesuffix("-accelerate")
    assert f"x 2 processes ({strategy})" in said
    out = place / block / "output_dir_distill" / "low"
    for form in ("diffusers", "comfyui", "kohya"):
        name = f"lora-low-{form}.safetensors"
        one, two = load_file(of_one / name), load_file(out / name)
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
        assert 0 < apart(one, two) < 0.1  # another batch, the same beginning


@pytest.mark.long
def test_two_machines_are_one_run(of_one: Path, place: Path, tiny_i2v: Path) -> None:
    """Two launchers on loopback."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "NUM_PROCESS": "2", "STEPS": "1"}
    machines = [typed(MACHINES, place, tiny_i2v, RANK=str(n), **common) for n in (1, 0)]
    of_second, of_first = (ended(machine) for machine in machines)
    assert "x 2 processes (fsdp)" in of_first and "saved    " in of_first
    assert "saved    " not in of_second
