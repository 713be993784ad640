"""A disk that is full, a real one: at every point where there is no room the cache stays whole."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.kill_many import contents
from tests.preprocess.conftest import wanprep

STEP = 40  # kilobytes


@dataclass(frozen=True)
class Disk:
    """A mounted disk in memory."""

    folder: Path

    @property
    def used(self) -> int:
        """Kilobytes."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024

    def resize(self, kilobytes: int) -> None:
        options = f"remount,size={kilobytes}k"
        subprocess.run(["mount", "-o", options, str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """One with a single page."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk here; kill_many.py --fault enospc pretends to")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
def test_a_disk_that_grows_little_by_little(
    disk: Disk, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    """Every command runs until it has room; what the disk holds after each refusal is whole."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        shape = (64, 64, 3) if number % 2 else (48, 96, 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"picture {number}")

    def commands(shards: Path) -> list[tuple[object, ...]]:
        encode = (
            *("encode", "--model", tiny_t2v, "--train-data-dir", data, "--output", shards),
            *("--size", 64, "--device", "cpu"),
        )
        recaption = ("recaption", "--name", "words", "--same-captions", "--model", tiny_t2v)
        add = ("add-condition", "--model", tiny_i2v, "--train-data-dir", data)
        there = ("--shards", shards)
        return [
            encode,
            (*recaption, *there, "--device", "cpu"),
            (*add, *there, "--device", "cpu"),
            ("remove", *there, "--sample", "0.png", "--sample", "1.png"),
            ("compact", *there),
        ]

    refused = 0
    shards, plenty = disk.folder / "shards", tmp_path / "plenty"
    for on_disk, with_room in zip(commands(shards), commands(plenty), strict=True):
        before = contents(plenty)
        ran = wanprep(*with_room)
        assert ran.code == 0, ran.err
        wanted = contents(plenty)
        size = disk.used or 4
        disk.resize(size)  # nothing is free
        while (ran := wanprep(*on_disk)).code != 0:
            refused += 1
            assert ran.code == 1 and "make room" in ran.err, ran.err
            if "The samples are removed, the index is old" in ran.err:
                on_disk = ("index", "--shards", shards)  # as the message says
            left = contents(shards)  # checks every checksum on the way
            assert all(found in (before.get(key), wanted.get(key)) for key, found in left.items())
            assert (before.keys() & wanted.keys()) <= left.keys()
            size = max(size, disk.used) + STEP
            disk.resize(size)
        assert contents(shards) == wanted
    assert refused >= 10
