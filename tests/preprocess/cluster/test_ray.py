"""`--engine ray` on real clusters of this machine, whose actors and nodes are killed."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shared.cache.writer import free_writer_lock, writer_lock
from shared.format.cache import committed_shards
from tests.foreign_names import foreign_names
from tests.preprocess.conftest import REPOSITORY, Cache, wanprep, wanprep_process, write_metadata

pytest.importorskip("ray", reason="the ray extra is not installed")

SETTINGS = ("--size", 256, "--dtype", "fp32", "--shard-size-mb", 1, "--device", "cpu")
ON_RAY = ("--engine", "ray", "--ray-actors", 2)


def command(model: Path, data: Path, output: Path) -> tuple[object, ...]:
    options = ("--model", model, "--train-data-dir", data, "--output", output)
    return ("encode", *options, *SETTINGS, "--num-workers", 1)


@pytest.fixture(scope="module")
def alone(pictures: Path, tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of `pictures`, by one process without Ray."""
    output = tmp_path_factory.mktemp("alone")
    ran = wanprep(*command(tiny_i2v, pictures, output))
    assert ran.code == 0, ran.err
    return Cache.open(output)


class Run:
    """A command in a process of its own, followed as a user would."""

    def __init__(
        self,
        *arguments: object,
        cwd: Path = REPOSITORY,
        program: str = "wanprep",
        **environment: str,
    ) -> None:
        environment = {"RAY_ADDRESS": "", **environment}
        self.process = wanprep_process(*arguments, cwd=cwd, program=program, **environment)
        self.said = ""

    def actor(self, writer: int) -> int:
        """The process of the actor with this writer number; waits until it is up."""
        pattern = rf"process (\d+), writer w{writer:03d}\) is up"
        while not (found := re.search(pattern, self.said)):
            assert self.process.stderr is not None
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        return int(found[1])

    def until(self, folder: Path, pattern: str) -> None:
        """Wait for a file."""
        while not list(folder.glob(pattern)):
            assert self.process.poll() is None, self.said
            time.sleep(0.002)

    def end(self) -> tuple[int, str]:
        """Exit code, and stderr from the start."""
        _, rest = self.process.communicate(timeout=500)
        self.said += rest
        return self.process.returncode, self.said


def samples_written(folder: Path) -> int:
    return sum(sidecar.count for sidecar in committed_shards(folder) if sidecar.kind == "samples")


def _same_and_whole(output: Path, alone: Cache) -> None:
    """Byte for byte the plain engine's samples, none written twice, nothing left behind."""
    assert Cache.open(output).contents() == alone.contents()
    assert samples_written(output) == 12
    left = [path.name for path in output.iterdir() if re.match(r"\.text-|.*\.tmp$", path.name)]
    assert left == []
    assert not list(output.glob("rejected*"))


@pytest.mark.long
def test_an_actor_killed_on_the_way_costs_nothing(
    pictures: Path, tiny_i2v: Path, alone: Cache, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """From a folder where modules are called as ours: Ray puts it before all packages."""
    cwd = foreign_names(tmp_path_factory.mktemp("place"))
    run = Run(*command(tiny_i2v, pictures, tmp_path), *ON_RAY, cwd=cwd)
    killed = run.actor(writer=1)
    run.until(tmp_path, "h*-w001-*.tar.tmp")
    os.kill(killed, signal.SIGKILL)
    code, err = run.end()
    assert code == 0, err
    assert "an actor takes 2 CPU" in err
    assert re.search(rf"lost .*process {killed}, writer w001\): .*; \d+ given to others", err), err
    _same_and_whole(tmp_path, alone)
    assert {s.shard.split("-")[-2] for s in committed_shards(tmp_path)} >= {"w000", "w002"}

    ran = wanprep(*command(tiny_i2v, pictures, tmp_path))
    assert ran.code == 0 and "nothing to do" in ran.out, ran.err


@pytest.mark.long
def test_a_clip_of_which_one_caption_is_committed(
    pictures: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    """Its actor died between two shards: the other captions get the latents of the first."""
    data, output, expected = tmp_path / "data", tmp_path / "shards", tmp_path / "alone"
    data.mkdir()
    captions = ["one", "two", "three", "four", "five"]  # a shard closes after 6 to 9 samples
    entries = [
        {"file_path": str(path), "captions": captions} for path in sorted(pictures.glob("*.png"))
    ]
    write_metadata(data, entries)
    run = Run(*command(tiny_i2v, data, output), *ON_RAY[:2], "--ray-actors", 1)
    killed = run.actor(writer=1)
    run.until(output, "h*-w001-*.json")
    os.kill(killed, signal.SIGKILL)
    code, err = run.end()
    assert code == 0, err
    assert list(output.glob("h*-w000-*.tar"))  # by the driver, which has no VAE
    assert samples_written(output) == 60
    ran = wanprep(*command(tiny_i2v, data, expected))
    assert ran.code == 0, ran.err
    assert Cache.open(output).contents() == Cache.open(expected).contents()
    rgb, alone = Cache.open(output).index.latent_rgb, Cache.open(expected).index.latent_rgb
    assert rgb is not None and alone is not None
    assert (rgb.samples, rgb.held_out) == (alone.samples, alone.held_out)  # a clip counts once


def _descendants(process: int) -> set[int]:
    """Every process below one, by /proc."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {process}


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.long
def test_a_stop_commits_and_leaves_no_process(
    pictures: Path, tiny_i2v: Path, alone: Cache, tmp_path: Path
) -> None:
    """What is encoded is in the shards, on every actor; another engine goes on from there."""
    run = Run(*command(tiny_i2v, pictures, tmp_path), *ON_RAY[:2], "--ray-actors", 1)
    run.actor(writer=1)
    run.until(tmp_path, "h*-w001-*.tar.tmp")
    started = _descendants(run.process.pid)
    assert len(started) > 4  # the cluster's, an actor, decoders
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 143, err
    written = samples_written(tmp_path)
    assert 0 < written < 12 and len(Cache.open(tmp_path).index) == written
    assert f"interrupted, {12 - written} samples to go" in err
    deadline = time.monotonic() + 60
    while any(map(_lives, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, started))

    ran = wanprep(*command(tiny_i2v, pictures, tmp_path))
    assert ran.code == 0 and f"{written} in the shards" in ran.err, ran.err
    _same_and_whole(tmp_path, alone)


@pytest.mark.long
def test_nodes_come_and_go(pictures: Path, tiny_i2v: Path, alone: Cache, tmp_path: Path) -> None:
    """One node, then a second, then the first is gone, with what it had not committed."""
    from ray.cluster_utils import Cluster

    def node(cluster: Any) -> Any:
        return cluster.add_node(num_cpus=2, object_store_memory=100_000_000)

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100_000_000,
            "include_dashboard": False,
        },
    )
    try:
        first = node(cluster)
        run = Run(
            *command(tiny_i2v, pictures, tmp_path),
            *("--engine", "ray", "--ray-address", cluster.address),
        )
        gone = int(run.actor(writer=1))
        os.kill(gone, signal.SIGSTOP)  # or all would be done before another node is up
        node(cluster)
        cluster.remove_node(first, allow_graceful=False)
        with suppress(ProcessLookupError):
            os.kill(gone, signal.SIGKILL)  # stopped, it would not see that its node is gone
        run.actor(writer=2)
        code, err = run.end()
        assert code == 0, err
        assert re.search(
            rf"lost .*process {gone}, writer w001\): its node is gone or out of reach; ", err
        ), err
    finally:
        cluster.shutdown()
    _same_and_whole(tmp_path, alone)
    ran = wanprep(*command(tiny_i2v, pictures, tmp_path))
    assert ran.code == 0 and "nothing to do" in ran.out, ran.err


def test_writers_take_free_numbers(tmp_path: Path) -> None:
    with writer_lock(tmp_path, 0), writer_lock(tmp_path, 2):
        with free_writer_lock(tmp_path, 1) as one, free_writer_lock(tmp_path, 1) as three:
            assert (one, three) == (1, 3)
            with free_writer_lock(tmp_path, 999) as last, free_writer_lock(tmp_path, 999) as first:
                assert (last, first) == (999, 4)
        with free_writer_lock(tmp_path, 1) as again:
            assert again == 1


def test_without_ray_the_extra_is_named(
    pictures: Path, tiny_i2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain engine never imports it, and the other one says what to install."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('no ray here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    arguments = command(tiny_i2v, pictures, tmp_path / "out")
    code, err = Run(*arguments, "--engine", "ray").end()
    assert code == 1
    assert "error: --engine ray: Ray is not installed" in err
    assert "pip install 'wandistill[ray]'" in err
    assert "Traceback" not in err
