"""Cells through the command line: what lies in the shards is of the pictures that are shown."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.field import ffmpeg
from tests.field.cells import Cell
from tests.field.clips import CELLS
from tests.field.codecs import h264
from tests.field.rejected import REJECTED
from tests.preprocess.conftest import Cache, wanprep

NAMES = (
    "avi-h-264-b-frames.avi",
    "mpeg-ps-mpeg-2-b-frames.mpg",
    "mp4-hevc-edit-list.mp4",
    "mov-hevc-turned-and-mirrored-as-7.mov",
    "mkv-h-264-times-below-0.mkv",
    "webm-vp9-size-changes.webm",
    "webm-vp8-no-duration.webm",
    "mp4-av1-hidden-frames.mp4",
    "apng-apng-default-image-apart.apng",
)
REFUSED = ("mp4-hevc-hdr-smpte2084.mp4", "mp4-h-264-cut-off.mp4")
OPTIONS = ("--model", "toy", "--size", 64, "--video-sample-n-frames", 17, "--clips", "first")


@pytest.fixture(scope="module")
def chosen() -> dict[str, Cell]:
    cells = {cell.name: cell for cell in CELLS}
    return {name: cells[name] for name in (*NAMES, *REFUSED)}


@pytest.fixture(scope="module")
def caches(
    chosen: dict[str, Cell], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cache, Cache]:
    """Of the cells, and of clean re-encodes of the pictures that they show."""
    folder = tmp_path_factory.mktemp("encode")
    opened = []
    for kind in ("cells", "clean"):
        media = folder / kind
        media.mkdir()
        for name, cell in chosen.items():
            if kind == "cells":
                path = cell.make(media)
            elif name in REFUSED:
                continue
            else:
                path = media / f"{name}.mp4"
                ffmpeg.encode(path, *h264("-crf", 6), numbers=cell.expected,
                              size=cell.expected_size)  # fmt: skip
            path.with_suffix(".txt").write_text(name)
        bad = len(REFUSED) if kind == "cells" else 0
        shards = folder / f"shards of {kind}"
        ran = wanprep("encode", *OPTIONS, "--max-bad", bad, "--train-data-dir", media,
                      "--output", shards)  # fmt: skip
        assert ran.code == 0, ran.err
        opened.append(Cache.open(shards))
    return opened[0], opened[1]


def _row(cache: Cache, name: str) -> int:
    """By the caption: of clean clips with the same bytes only one is read."""
    (row,) = (row for row in range(len(cache.index)) if cache.info(row)["caption"] == name)
    return row


def _distances(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Of each latent frame of (C, F, H, W), relative to the other."""
    pairs = zip(one.unbind(1), other.unbind(1), strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_of_the_pictures_shown(
    name: str, chosen: dict[str, Cell], caches: tuple[Cache, Cache]
) -> None:
    cells, clean = caches
    cell = chosen[name]
    row, wanted = _row(cells, name), _row(clean, name)
    assert cells.info(row)["source"] == name
    indices = cells.info(row)["frame_indices"]
    most = min(17, (len(cell.expected) + 1) // 2)
    assert indices == list(range(0, 2 * ((most - 1) // 4 * 4 + 1), 2))
    assert indices == clean.info(wanted)["frame_indices"]
    assert cells.info(row)["fps"] == pytest.approx(cell.fps, rel=0.05)
    ours, theirs = cells.tensor(row, "latents").float(), clean.tensor(wanted, "latents").float()
    assert ours.shape == theirs.shape
    # Per latent frame: another picture is at 0.5 and more, a lossier codec below 0.2.
    assert max(_distances(ours, theirs)) < 0.3
    assert min(_distances(ours, theirs.roll(1, dims=1))) > 0.3  # so the comparison can fail


def test_what_is_refused_is_listed(caches: tuple[Cache, Cache]) -> None:
    cells, clean = caches
    assert len(cells.index) == len(clean.index) == len(NAMES)
    lines = (cells.folder / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    assert {Path(str(line["source"])).name for line in rejected} == set(REFUSED)
    for line in rejected:
        assert re.search(REJECTED[Path(str(line["source"])).name], str(line["reason"]))


def test_a_plan_counts_the_clips_of_a_recording_without_a_duration(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for cell in CELLS:
        if cell.oddity == "no duration" and cell.codec in ("VP8", "H.264"):
            cell.make(media).with_suffix(".txt").write_text(cell.name)
    options = ("--model", "toy", "--size", 64, "--video-sample-n-frames", 9, "--clips", "chunk",
               "--video-sample-stride", 1, "--train-data-dir", media)  # fmt: skip
    shards = tmp_path / "shards"
    planned = wanprep("plan", *options, "--output", shards)
    assert planned.code == 0, planned.err
    assert re.search(r"^in all +12 +0 +12 ", planned.out, re.MULTILINE)  # 2 × 60 // 9
    assert wanprep("encode", *options, "--output", shards).code == 0
    cache = Cache.open(shards)
    starts = sorted(cache.info(row)["frame_indices"][0] for row in range(len(cache.index)))
    assert starts == sorted(2 * list(range(0, 54, 9)))
