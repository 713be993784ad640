"""An S3 server of this machine, for the tests of object stores."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3fs

BUCKET = "bucket"


@dataclass(frozen=True)
class ObjectStore:
    """A running server, and what a process needs to reach it."""

    port: int
    log: Path
    """A line for each request."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def files(self) -> Any:
        """s3fs, which looks anew each time."""
        return s3fs.S3FileSystem(
            endpoint_url=f"http://127.0.0.1:{self.port}", key="test", secret="test",
            use_listings_cache=False, skip_instance_cache=True,
        )  # fmt: skip

    def download(self, prefix: str, folder: Path) -> Path:
        """Everything below a prefix of the bucket, as a folder."""
        files = self.files()
        root = f"{BUCKET}/{prefix}"
        for path in files.find(root):
            target = folder / path.removeprefix(root + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.cat_file(path))
        return folder

    def names(self, prefix: str) -> list[str]:
        """What lies below a prefix, without the index's files."""
        root = f"{BUCKET}/{prefix}/"
        found = [path.removeprefix(root) for path in self.files().find(root)]
        return [name for name in found if "index.zarr/" not in name]

    def upload(self, folder: Path, prefix: str) -> str:
        """URL of a copy of a folder, hidden files left out."""
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not name.startswith("."):
                self.files().put_file(str(path), f"{BUCKET}/{prefix}/{name}")
        return f"s3://{BUCKET}/{prefix}"

    def fetched(self, prefix: str) -> list[str]:
        """Names of what was read below a prefix so far, in order."""
        begin = f"GET /{BUCKET}/{prefix}/"
        lines = [line for line in self.log.read_text().splitlines() if begin in line]
        return [line.split(begin)[1].split(" ")[0] for line in lines]

    def deny(self, after: int) -> None:
        """Refuse everybody whom the server does not know, after so many requests more."""
        self._post("/moto-api/reset-auth", str(after).encode())

    def _post(self, path: str, data: bytes) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        plain = {"Content-Type": "text/plain"}
        with urllib.request.urlopen(urllib.request.Request(url, data, plain)) as answer:
            return bytes(answer.read())


@contextmanager
def running() -> Iterator[ObjectStore]:
    """A moto server in a process of its own, on a free port, with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tempfile.mkdtemp(prefix="wandistill-s3-")) / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    store = ObjectStore(port, log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                store.files().mkdir(BUCKET)
                break
            except Exception:
                assert server.poll() is None and time.monotonic() < deadline, "no S3 server"
                time.sleep(0.2)
        yield store
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(log.parent)


@contextmanager
def another_machine(folder: Path, **environment: str) -> Iterator[None]:
    """What this process would see on a machine whose local cache is `folder`."""
    changed = {**environment, "WANDISTILL_CACHE": str(folder)}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sidecars(store: ObjectStore, prefix: str) -> dict[str, dict[str, Any]]:
    """Tar name → sidecar, of every shard that a reader takes for whole."""
    files = store.files()
    names = store.names(prefix)
    return {
        name: json.loads(files.cat_file(f"{BUCKET}/{prefix}/{name.removesuffix('.tar')}.json"))
        for name in names
        if name.endswith(".tar") and name.removesuffix(".tar") + ".json" in names
    }
