"""`wanprep` into a bucket: what a folder gets, whatever kills it; what it says when it can't."""

import hashlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shared.format.cache import committed_shards
from shared.format.prompts import read_prompts
from shared.io.durable import FAULT
from shared.io.store import Store
from tests.object_store import BUCKET, ObjectStore, another_machine, sidecars
from tests.preprocess.conftest import REPOSITORY, Cache, Ran, wanprep, wanprep_process

SETTINGS = ("--size", 256, "--dtype", "fp32", "--shard-size-mb", 1, "--device", "cpu")


def command(model: Path, data: Path, output: object) -> tuple[object, ...]:
    options = ("--model", model, "--train-data-dir", data, "--output", output)
    return ("encode", *options, *SETTINGS, "--num-workers", 1)


@pytest.fixture(scope="module")
def local(pictures: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same data in a folder."""
    output = tmp_path_factory.mktemp("local")
    ran = wanprep(*command(tiny_t2v, pictures, output))
    assert ran.code == 0, ran.err
    cache = Cache.open(output)
    assert len(cache.index.shards) >= 2
    return cache


@pytest.fixture
def here(store: ObjectStore, tmp_path: Path) -> Iterator[ObjectStore]:
    """The server's address and an empty local cache, for commands in this process."""
    with another_machine(tmp_path / "cache", **store.environment):
        yield store


def elsewhere(store: ObjectStore, cache: Path, *arguments: object) -> Ran:
    """A command in this process, on a machine that has seen nothing of the store."""
    with another_machine(cache, **store.environment):
        return wanprep(*arguments)


def _refuse_half_shards(store: ObjectStore, prefix: str) -> None:
    """Whatever has a sidecar is whole."""
    for name, sidecar in sidecars(store, prefix).items():
        data = store.files().cat_file(f"{BUCKET}/{prefix}/{name}")
        assert hashlib.sha256(data).hexdigest() == sidecar["sha256"], name


def test_a_bucket_holds_what_a_folder_holds(
    here: ObjectStore, local: Cache, pictures: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/same/shards"
    ran = wanprep(*command(tiny_t2v, pictures, url))
    assert ran.code == 0, ran.err
    assert f"next: wantrain distill --shards {url}" in ran.out
    assert str(tmp_path) not in ran.out + ran.err  # the mirror is nobody's business
    names = here.names("same/shards")
    assert not [name for name in names if name.startswith(".") or name.endswith(".tmp")]

    # A copy of the bucket is a cache: for readers without our code, or without the store.
    copied = Cache.open(here.download("same/shards", tmp_path / "copied"))
    assert copied.contents() == local.contents()
    assert [
        prompt.role for prompt in read_prompts(Store(copied.folder), copied.index.prompt_shards)
    ] == [
        "empty",
        "negative",
    ]

    # Another machine finds everything there, and fetches no latents to see that.
    again = elsewhere(here, tmp_path / "other", *command(tiny_t2v, pictures, url))
    assert again.code == 0 and "nothing to do" in again.out, again.err
    fetched = [path.stat().st_size for path in (tmp_path / "other" / "shards").glob("*.tar")]
    prompts = committed_shards(copied.folder)[-1]
    assert prompts.kind == "prompts" and fetched == [prompts.bytes]
    assert here.names("same/shards") == names


@pytest.fixture(scope="module")
def points(
    store: ObjectStore,
    pictures: Path,
    tiny_t2v: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[str, str]]:
    """(what, file) of every fault point of an encode into an empty bucket, in order."""
    folder = tmp_path_factory.mktemp("points")
    process = wanprep_process(
        *command(tiny_t2v, pictures, f"s3://{BUCKET}/points"),
        cwd=REPOSITORY,
        WANDISTILL_CACHE=str(folder / "cache"),
        **{FAULT: f"log@{folder / 'log'}"},
        **store.environment,
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = (folder / "log").read_text().splitlines()
    return [(line.split(" ")[0], Path(line.split(" ", 1)[1]).name) for line in lines]


def _first(points: list[tuple[str, str]], what: str, ending: str) -> int:
    """Number of the first point at which a media shard's file, or the index's, is handled so."""
    return next(
        number
        for number, (kind, name) in enumerate(points, start=1)
        if kind == what and name.endswith(ending) and not name.startswith("prompts")
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "ending"),
    [
        ("upload", ".tar"),
        ("upload", "00001.json"),  # the tar is there, its sidecar is not
        ("upload", "zarr.json"),  # half of the index
        ("random", ""),
    ],
)
def test_killed_and_run_again_it_is_the_same_cache(
    what: str,
    ending: str,
    store: ObjectStore,
    points: list[tuple[str, str]],
    local: Cache,
    pictures: Path,
    tiny_t2v: Path,
    tmp_path: Path,
) -> None:
    if what == "random":
        number = random.randrange(1, len(points) + 1)
    else:
        number = _first(points, what, ending)
    prefix = f"killed/{what}-{number}"
    url = f"s3://{BUCKET}/{prefix}"
    process = wanprep_process(
        *command(tiny_t2v, pictures, url),
        cwd=REPOSITORY,
        WANDISTILL_CACHE=str(tmp_path / "cache"),
        **{FAULT: f"kill@{number}"},
        **store.environment,
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == -9, (number, err)
    _refuse_half_shards(store, prefix)
    begun = sidecars(store, prefix)

    # The machine is lost with all that lay on it, or it is the same one.
    cache = tmp_path / ("cache" if what == "random" else "other")
    ran = elsewhere(store, cache, *command(tiny_t2v, pictures, url))
    assert ran.code == 0, (number, ran.err)
    ended = sidecars(store, prefix)
    assert begun.items() <= ended.items()  # what was committed is not made again
    names = store.names(prefix)
    assert {name for name in names if name.endswith(".tar")} == set(ended)
    rows = {
        name.removesuffix(".rows.safetensors")
        for name in names
        if name.endswith(".rows.safetensors")
    }
    assert rows == {n.removesuffix(".tar") for n, one in ended.items() if one["kind"] == "samples"}
    copied = Cache.open(store.download(prefix, tmp_path / "copied"))
    assert copied.contents() == local.contents(), number


@pytest.mark.long
def test_two_ranks_fill_one_prefix(
    store: ObjectStore, local: Cache, pictures: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    """Two processes that share nothing but the bucket."""
    url = f"s3://{BUCKET}/ranks"
    processes = [
        wanprep_process(
            *command(tiny_t2v, pictures, url),
            cwd=REPOSITORY,
            RANK=str(rank),
            WORLD_SIZE="2",
            WANDISTILL_CACHE=str(tmp_path / f"machine{rank}"),
            **store.environment,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    copied = Cache.open(store.download("ranks", tmp_path / "copied"))
    assert {name.split("-")[-2] for name in copied.index.shards} == {"w000", "w001"}
    assert copied.contents() == local.contents()


def test_a_cache_in_a_bucket_is_changed_like_one_in_a_folder(
    here: ObjectStore, local: Cache, pictures: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/changed"
    assert wanprep(*command(tiny_t2v, pictures, url)).code == 0
    other = {"cache": tmp_path / "other"}

    removed = elsewhere(here, other["cache"], "remove", "--shards", url, "--sample", "0-*")
    assert removed.code == 0 and f"9 left in {url}" in removed.out, removed.err
    # Names of files are read by themselves: only the prompts were fetched, if anything.
    assert not [p for p in (other["cache"] / "shards").glob("*.tar") if p.stat().st_size > 100_000]
    compacted = elsewhere(here, other["cache"], "compact", "--shards", url)
    assert compacted.code == 0 and "3 dead samples dropped" in compacted.out, compacted.err
    assert not [name for name in here.names("changed") if name.startswith("tombstones")]

    captions = tmp_path / "captions.json"
    files = [(f"{n}-{part}.png", f"short {n}") for n in (1, 2, 3) for part in range(3)]
    captions.write_text(json.dumps([{"file_path": file, "text": text} for file, text in files]))
    options = (
        "--train-data-dir",
        pictures,
        "--train-data-meta",
        captions,
        "--model",
        tiny_t2v,
        "--device",
        "cpu",
    )
    ran = wanprep("recaption", "--name", "short", "--shards", url, *options)
    assert ran.code == 0 and f"{url}/captions/short: 9 captions" in ran.out, ran.err
    index = wanprep("index", "--shards", url)
    assert index.code == 0 and f"{url}: 9 samples" in index.out, index.err

    copied = Cache.open(here.download("changed", tmp_path / "copied"))
    wanted = local.contents()
    assert len(copied.contents()) == 9 * 4 and copied.contents().items() <= wanted.items()
    overlay = Cache.open(copied.folder / "captions" / "short")
    assert {overlay.info(row)["caption"] for row in range(9)} == {"short 1", "short 2", "short 3"}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("another chunk", marks=pytest.mark.long),
        pytest.param("no manifest", marks=pytest.mark.long),
        "another manifest",
    ],
)
def test_an_index_that_is_not_of_one_piece_is_made_again(
    damage: str, here: ObjectStore, local: Cache, tmp_path: Path
) -> None:
    """As two ranks may leave it that wrote theirs at once, had not both looked again."""
    url = here.upload(local.folder, f"torn/{damage}")  # a copy of a folder: no rows beside tars
    root = f"{BUCKET}/torn/{damage}"
    files = here.files()
    if damage == "another chunk":
        chunk = files.cat_file(f"{root}/index.zarr/offset/c/0/0")
        files.pipe_file(f"{root}/index.zarr/offset/c/0/0", chunk[::-1])
    elif damage == "no manifest":
        files.rm_file(f"{root}/manifest.json")
    else:
        manifest = json.loads(files.cat_file(f"{root}/manifest.json"))
        files.pipe_file(f"{root}/manifest.json", json.dumps({**manifest, "index": "0"}).encode())
    ran = wanprep("remove", "--shards", url, "--sample", "0-0.png")
    assert ran.code == 0 and "11 left" in ran.out, ran.err
    copied = Cache.open(here.download(f"torn/{damage}", tmp_path / "copied"))
    assert len(copied.index.read_columns()["key"]) == 11
    assert copied.contents().items() <= local.contents().items()


class _Outage:
    """Forwards a port to a server until told to refuse, then for some seconds to nobody."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._refuse_until = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def begin(self, seconds: float) -> None:
        self._refuse_until = time.monotonic() + seconds

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if time.monotonic() < self._refuse_until:
                    self.refused += 1
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if time.monotonic() < self._refuse_until:
                    break
                other.sendall(data)
        one.close()
        other.close()


@pytest.mark.long
def test_a_store_that_is_away_for_half_a_minute_costs_half_a_minute(
    store: ObjectStore, local: Cache, pictures: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    outage = _Outage(store.port)
    environment = {**store.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{outage.port}"}
    process = wanprep_process(
        *command(tiny_t2v, pictures, f"s3://{BUCKET}/outage"),
        cwd=REPOSITORY,
        WANDISTILL_CACHE=str(tmp_path / "cache"),
        **environment,
    )
    while not sidecars(store, "outage"):  # the prompts are there, the media are encoded now
        assert process.poll() is None
        time.sleep(0.05)
    outage.begin(30)
    _, err = process.communicate(timeout=300)
    outage.close()
    assert process.returncode == 0, err
    assert outage.refused > 0
    copied = Cache.open(store.download("outage", tmp_path / "copied"))
    assert copied.contents() == local.contents()


def test_a_bucket_that_is_not_there(here: ObjectStore, pictures: Path, tiny_t2v: Path) -> None:
    ran = wanprep(*command(tiny_t2v, pictures, "s3://nowhere/shards"))
    assert ran.code == 1
    assert (
        "s3://nowhere/shards: there is no such bucket" in ran.err and "Make the bucket" in ran.err
    )


def test_access_denied(here: ObjectStore, pictures: Path, tiny_t2v: Path) -> None:
    here.deny(after=0)
    try:
        ran = wanprep(*command(tiny_t2v, pictures, f"s3://{BUCKET}/denied"))
    finally:
        here.deny(after=10**9)
    assert ran.code == 1
    assert f"s3://{BUCKET}/denied: access is denied" in ran.err and "credentials" in ran.err


def test_a_missing_package_is_named(
    here: ObjectStore, pictures: Path, tiny_t2v: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    loaded = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(loaded, "s3", raising=False)
    monkeypatch.delitem(loaded, "s3a", raising=False)
    ran = wanprep(*command(tiny_t2v, pictures, f"s3://{BUCKET}/x"))
    assert ran.code == 1
    assert 'pip install "wandistill[s3]"' in ran.err


def test_an_unknown_protocol(here: ObjectStore, pictures: Path, tiny_t2v: Path) -> None:
    ran = wanprep(*command(tiny_t2v, pictures, "s4://bucket/x"))
    assert ran.code == 1 and "s4://bucket/x: " in ran.err and "s3://bucket/shards" in ran.err
