"""Actors that are killed or fail, and the items that they had in hand, on a cluster here."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.interrupt import Interruption, catch_signals

pytest.importorskip("ray", reason="the ray extra is not installed")


class _Clerks:
    """A fleet of `ray_tasks.Clerk` that writes into a folder."""

    def __init__(self, folder: Path, signals: Interruption, room: int = 2) -> None:
        import ray

        from shared.cluster.fleet import Fleet
        from tests.shared.cluster.ray_tasks import Clerk

        actor = ray.remote(Clerk).options(num_cpus=1, max_concurrency=1)

        def unfinished(items: Sequence[str]) -> list[str]:
            return [item for item in items if not (folder / item).exists()]

        self.lines: list[str] = []
        self.fleet: Fleet[str] = Fleet(
            lambda number: actor.remote(folder),
            room=lambda: room,
            demand="1 CPU",
            unfinished=unfinished,
            lease=4,
            in_hand=2,
            worth=1,
            signals=signals,
            say=self.lines.append,
        )


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[None]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def test_items_that_kill_their_actor_are_rejected(small_cluster: None, tmp_path: Path) -> None:
    good = [f"good-{number}" for number in range(40)]
    items = [*good[:7], "kill-1", *good[7:20], "raise-1", "bad-1", *good[20:]]
    with catch_signals("") as signals:
        clerks = _Clerks(tmp_path, signals)
        done = list(clerks.fleet.run(items))
    rejected = {item: reason for item, reason in done if reason is not None}
    assert set(rejected) == {"kill-1", "raise-1", "bad-1"}
    assert rejected["bad-1"] == "bad-1: cannot decode"
    assert re.match(r"[3-9] actors failed over it, the last so: ", rejected["kill-1"])
    assert "RuntimeError: device-side assert in raise-1" in rejected["raise-1"]
    assert sorted(item for item, reason in done if reason is None) == sorted(good)
    # Mostly once; an actor that is given up may finish what it has in hand before it dies, while
    # another does it, too. In a cache that is one sample: the newest of equal keys counts.
    times = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert times.keys() == set(good) and sum(times.values()) <= len(good) + 8
    # Three each, but where both were in one actor's hand.
    assert sum(line.startswith("lost") for line in clerks.lines) >= 5


@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [("full", OSError, "No space"), ("user", UserError, r"^node x: no such model$")],
)
def test_what_would_befall_every_actor_ends_the_run(
    item: str, kind: type[Exception], message: str, small_cluster: None, tmp_path: Path
) -> None:
    """And what the others have encoded is committed."""
    with catch_signals("") as signals:
        clerks = _Clerks(tmp_path, signals)
        with pytest.raises(kind, match=message):
            list(clerks.fleet.run([*"abcdefghijkl", item]))
        clerks.fleet.rescue()
    assert len(list(tmp_path.iterdir())) >= 4


@pytest.mark.long
def test_actors_that_never_come_up_end_the_run(small_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "no start").touch()
    with catch_signals("") as signals:
        clerks = _Clerks(tmp_path, signals, room=1)
        with pytest.raises(UserError, match=r"^--engine ray: \d+ actors failed one after the"):
            list(clerks.fleet.run(["a", "b"]))
        clerks.fleet.rescue()
