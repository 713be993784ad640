"""`wanprep encode` of media in a bucket: the samples that a folder gives, and what is fetched."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests.object_store import BUCKET, ObjectStore, another_machine
from tests.preprocess.conftest import Cache, render_clip, wanprep


def command(model: Path, data: object, output: object, *more: object) -> tuple[object, ...]:
    settings = ("--size", 64, "--video-sample-n-frames", 9, "--video-sample-stride", 1)
    options = ("--model", model, "--train-data-dir", data, "--output", output)
    return ("encode", *options, *settings, "--device", "cpu", "--num-workers", 1, *more)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and a picture, in folders and with names that stores and globs take badly."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "a b" / "[1]").mkdir(parents=True)
    names = ("one.mp4", "a b/two ü.mp4", "a b/[1]/three+%20?.mp4")
    for number, name in enumerate(names):
        render_clip(folder / name, height=64, width=96, frames=10 + number, seed=number)
        (folder / name).with_suffix(".txt").write_text(f"clip {number}")
    Image.new("RGB", (80, 60), "teal").save(folder / "picture.png")
    (folder / "picture.txt").write_text("teal")
    Image.new("RGB", (80, 60), "red").save(folder / "without.png")  # no caption
    (folder / "unknown.xyz").write_bytes(b"x")
    (folder / "unknown.txt").write_text("somebody wanted it")
    return folder


@pytest.fixture
def here(store: ObjectStore, tmp_path: Path) -> Iterator[ObjectStore]:
    with another_machine(tmp_path / "cache", **store.environment):
        yield store


def _rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {one["source"]: one["reason"] for one in map(json.loads, lines)}


def test_a_folder_in_a_bucket_gives_the_samples_of_a_folder(
    here: ObjectStore, media: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    ran = wanprep(*command(tiny_t2v, media, tmp_path / "local", "--max-bad", 2))
    assert ran.code == 0, ran.err
    local = Cache.open(tmp_path / "local")
    assert len(local.index) == 4

    url = here.upload(media, "folder/media")
    for name in (".Trash/old.mp4", ".Trash/old.txt", "clips.tar"):  # not even looked into
        here.files().pipe_file(f"{BUCKET}/folder/media/{name}", b"x")
    target = f"s3://{BUCKET}/folder/shards"
    ran = wanprep(*command(tiny_t2v, url, target, "--max-bad", 2))
    assert ran.code == 0, ran.err
    assert f"dataset  {url}: 4 usable" in ran.err
    assert "found    9 files: 4 used, 2 rejected, 3 left out\n" in ran.err
    remote = Cache.open(here.download("folder/shards", tmp_path / "remote"))
    assert remote.contents() == local.contents()  # JSON too: sources, frames, captions
    assert _rejected(remote.folder) == _rejected(local.folder)
    assert set(_rejected(local.folder)) == {"without.png", "unknown.xyz"}

    # A rerun fetches neither media nor captions; what is edited or added is fetched alone.
    before = len(here.fetched("folder/media"))
    assert "one.mp4" in here.fetched("folder/media")
    again = wanprep(*command(tiny_t2v, url, target, "--max-bad", 2))
    assert again.code == 0 and "nothing to do" in again.out, again.err
    assert len(here.fetched("folder/media")) == before
    files = here.files()
    files.pipe_file(f"{BUCKET}/folder/media/one.txt", b"another caption")
    render_clip(tmp_path / "new.mp4", height=64, width=96, frames=9, seed=7)
    files.put_file(str(tmp_path / "new.mp4"), f"{BUCKET}/folder/media/picture/new.mp4")
    files.pipe_file(f"{BUCKET}/folder/media/picture/new.txt", b"new")
    edited = wanprep(*command(tiny_t2v, url, target, "--max-bad", 2))
    assert edited.code == 0 and "2 to encode" in edited.err, edited.err
    fetched = set(here.fetched("folder/media")[before:])
    assert fetched == {"one.txt", "picture/new.mp4", "picture/new.txt"}


@pytest.mark.long
def test_a_list_in_a_bucket(here: ObjectStore, media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    url = here.upload(media, "list/media")
    other = here.upload(media, "list/other")
    entries = [
        {"file_path": "one.mp4", "text": "relative"},
        {"file_path": f"{url}/picture.png", "text": "inside, by its URL"},
        {"file_path": f"{other}/a b/two ü.mp4", "text": "elsewhere"},
        {"file_path": "../other/without.png", "text": "up and down"},
        {"file_path": "none.mp4", "text": "missing"},
        {"file_path": "s3://nowhere/x.mp4", "text": "no bucket"},
    ]
    lines = "\n".join(json.dumps(entry) for entry in entries)
    here.files().pipe_file(f"{BUCKET}/list/entries.jsonl", lines.encode())
    listed = ("--train-data-meta", f"s3://{BUCKET}/list/entries.jsonl")
    ran = wanprep(*command(tiny_t2v, url, tmp_path / "out", *listed))
    assert ran.code == 1 and f"dataset  s3://{BUCKET}/list/entries.jsonl: 6 usable" in ran.err
    cache = Cache.open(tmp_path / "out")
    sources = {cache.info(row)["source"]: cache.info(row)["caption"] for row in range(4)}
    assert sources == {
        "one.mp4": "relative",
        "picture.png": "inside, by its URL",
        f"{other}/a b/two ü.mp4": "elsewhere",
        f"{other}/without.png": "up and down",
    }
    reasons = _rejected(tmp_path / "out")
    assert f"{url}/none.mp4: there is no such bucket or object" in reasons["none.mp4"]
    assert "there is no such bucket" in reasons["s3://nowhere/x.mp4"]


def test_datasets_of_a_toml_file_may_lie_in_a_bucket(
    here: ObjectStore, media: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    url = here.upload(media / "a b", "toml/media")
    shutil.copytree(media / "a b", tmp_path / "local")
    config = tmp_path / "sets.toml"
    config.write_text(
        f'[[datasets]]\nvideo_directory = "{url}"\nnum_repeats = 3\n'
        f'[[datasets]]\nvideo_directory = "{tmp_path / "local"}"\n'
    )
    ran = wanprep(*command(tiny_t2v, "none", tmp_path / "out", "--dataset-config", config))
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "out")
    infos = [cache.info(row) for row in range(len(cache.index))]  # the same content twice
    assert {info["source"] for info in infos} == {f"{url}/two ü.mp4", f"{url}/[1]/three+%20?.mp4"}
    assert [info["repeats"] for info in infos] == [3, 3]


@contextmanager
def _server(good: bytes) -> Iterator[str]:
    """An HTTP server whose /slow.mp4 stops in the middle, and whose /good.mp4 is whole."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(good)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if "good" in self.path:
                self.wfile.write(good)
            else:
                self.wfile.write(good[:100])
                self.wfile.flush()
                stop.wait(60)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop.set()
        server.shutdown()
        server.server_close()


def test_a_download_that_hangs_costs_its_file(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    with _server((media / "one.mp4").read_bytes()) as url:
        entries = [{"file_path": f"{url}/{name}.mp4", "text": name} for name in ("slow", "good")]
        (tmp_path / "list.json").write_text(json.dumps(entries))
        more = ("--train-data-meta", tmp_path / "list.json", "--decode-timeout", 4)
        with another_machine(tmp_path / "cache"):
            ran = wanprep(*command(tiny_t2v, tmp_path, tmp_path / "out", *more))
    assert ran.code == 1
    cache = Cache.open(tmp_path / "out")
    assert [cache.info(row)["source"] for row in range(len(cache.index))] == [f"{url}/good.mp4"]
    assert "took longer than 4 s" in _rejected(tmp_path / "out")[f"{url}/slow.mp4"]


def test_an_empty_prefix(here: ObjectStore, tiny_t2v: Path, tmp_path: Path) -> None:
    ran = wanprep(*command(tiny_t2v, f"s3://{BUCKET}/nothing/here", tmp_path / "out"))
    assert ran.code == 1 and f"s3://{BUCKET}/nothing/here has no metadata.json" in ran.err


def test_media_in_a_bucket_that_is_not_there(
    here: ObjectStore, tiny_t2v: Path, tmp_path: Path
) -> None:
    ran = wanprep(*command(tiny_t2v, "s3://nowhere/media", tmp_path / "out"))
    assert ran.code == 1 and "s3://nowhere/media: there is no such bucket" in ran.err
