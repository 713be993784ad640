"""`wantrain synthesize --engine ray` on clusters of this machine, whose actors are killed."""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.format.cache import committed_shards
from shared.format.prompts import prompts_by_shard
from shared.io.store import Store
from tests.preprocess.cluster.test_ray import Run, samples_written
from tests.preprocess.conftest import Cache
from tests.train.conftest import encode
from tests.train.synthesis.test_synthesize import synthesize

OPTIONS = ("--steps", 4, "--states", "1000 400", "--clips-per-caption", 4)
CAPTIONS, CLIPS = ("a red ball", "a blue kite, rising", "rain on a roof"), 12


@dataclass(frozen=True)
class Case:
    """A model, a cache for it, and the clips that an ordinary run makes of that."""

    model: Path
    cache: Path
    alone: Path

    def on_ray(self, output: Path, actors: int, *more: object) -> Run:
        """The same clips by a command on Ray, under way."""
        words = ("--model", self.model, "--shards", self.cache, "--output", output, *OPTIONS)
        on_ray = ("--engine", "ray", "--ray-actors", actors, "--device", "cpu")
        return Run("synthesize", *words, *on_ray, *more, program="wantrain")

    def check(self, output: Path) -> None:
        """Byte for byte the ordinary run's samples and prompts, and nothing left behind."""
        assert Cache.open(output).contents() == Cache.open(self.alone).contents()
        assert samples_written(output) == CLIPS
        assert _prompts(output) == _prompts(self.alone)
        assert not [p.name for p in output.iterdir() if re.match(r"\.handover|.*\.tmp$", p.name)]


def _case(model: Path, folder: Path) -> Case:
    folder.mkdir()
    (folder / "list.txt").write_text("\n".join(CAPTIONS))
    listed = ("--train-data-meta", str(folder / "list.txt"))
    cache = encode(folder, model, folder / "cache", "--fix-sample-size", "64", "64", *listed)
    return Case(model, cache, synthesize(model, cache, folder / "alone", *OPTIONS))


@pytest.fixture(scope="module")
def two_experts(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _case(tiny_t2v, tmp_path_factory.mktemp("two") / "case")


@pytest.fixture(scope="module")
def one_expert(tiny_ti2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _case(tiny_ti2v, tmp_path_factory.mktemp("one") / "case")


def _prompts(folder: Path) -> dict[str, dict[str, bytes]]:
    store = Store(folder)
    shards = tuple(s.shard for s in committed_shards(folder) if s.kind == "prompts")
    return {p.key: p.members() for shard in prompts_by_shard(store, shards) for p in shard}


@pytest.mark.long
def test_it_is_the_cache_of_an_ordinary_run(
    two_experts: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, err = two_experts.on_ray(tmp_path, 2, "--batch-size", 1).end()
    assert code == 0, err
    assert "cluster  1 node, 4 CPU; an actor takes 2 CPU" in err
    two_experts.check(tmp_path)
    assert len(_prompts(tmp_path)) == 2
    writers = {s.shard.split("-")[-2] for s in committed_shards(tmp_path) if s.kind == "samples"}
    assert writers <= {"w001", "w002"}
    capfd.readouterr()
    synthesize(two_experts.model, two_experts.cache, tmp_path, *OPTIONS)
    assert "nothing to do" in capfd.readouterr().out


@pytest.mark.long
def test_an_actor_killed_on_the_way_costs_nothing(one_expert: Case, tmp_path: Path) -> None:
    run = one_expert.on_ray(tmp_path, 1)
    killed = run.actor(writer=1)
    run.until(tmp_path, "h*-w001-*.tar.tmp")
    os.kill(killed, signal.SIGKILL)
    code, err = run.end()
    assert code == 0, err
    assert re.search(rf"lost .*process {killed}, writer w001\): .*; \d+ given to others", err), err
    one_expert.check(tmp_path)


@pytest.mark.long
def test_a_stop_commits_and_another_engine_goes_on(two_experts: Case, tmp_path: Path) -> None:
    """By the low-noise expert: its clips are in shards, the others' states in hand-over files."""
    run = two_experts.on_ray(tmp_path, 1)
    run.actor(writer=1)
    run.until(tmp_path, "h*-w001-*.tar.tmp")
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 128 + signal.SIGTERM, err
    written = samples_written(tmp_path)
    assert 0 < written < CLIPS and len(Cache.open(tmp_path).index) == written
    assert f"interrupted, {CLIPS - written} clips to go" in err
    assert len(list(tmp_path.glob(".handover-*/*"))) == CLIPS
    synthesize(two_experts.model, two_experts.cache, tmp_path, *OPTIONS)
    two_experts.check(tmp_path)


@pytest.mark.parametrize(
    ("options", "environment", "named"),
    [
        (("--ray-actors", 2), {}, "--ray-actors: 2 without --engine ray"),
        (("--engine", "ray", "--ray-address", "ray://head:1"), {}, "--ray-address: .* Client's"),
        (
            ("--engine", "ray", "--output", "memory://clips"),
            {},
            "--engine ray: --output is memory://clips, and clips between the experts wait in it",
        ),
        (
            ("--engine", "ray", "--num-processes", 2),
            {},
            "--num-processes: found 2 with --engine ray.*--ray-actors",
        ),
        (("--engine", "ray"), {"RANK": "1", "WORLD_SIZE": "2"}, "--engine ray: .* rank 1 of 2"),
    ],
)
def test_what_is_refused(
    options: tuple[object, ...], environment: dict[str, str], named: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before a model or shards are looked for."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        synthesize(tmp_path / "no model", tmp_path / "no shards", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_joins_no_cluster(
    two_experts: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = ("--engine", "ray", "--ray-address", "no-such-node:6379")
    words = (*OPTIONS, *there, "--dry-run")
    synthesize(two_experts.model, two_experts.cache, tmp_path / "out", *words)
    out = capfd.readouterr().out
    assert "on a Ray cluster" in out and f"{CLIPS} to make" in out
