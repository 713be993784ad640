"""Every page that a user is given, as Chromium shows it: complete, playing, and by itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from preprocess.cli.app import app as wanprep
from scripts.demo_page import Column, Curve, page
from shared.io.mp4 import write_mp4
from tests import browser
from tests.train.conftest import encode, write_dataset
from tests.train.evaluation.test_measures import moving
from tests.train.page.test_run_page import shards, whole  # noqa: F401 - fixtures
from tests.train.test_distill import distill
from train.cli.app import app as wantrain

pytestmark = pytest.mark.long

LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft/" * 3
HOSTILE = f"</p></h3><script>alert(1)</script><img src=https://evil.example/x> {LONG_WORD}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.running() as started:
        yield started


def faults(page: browser.Page, *, clips: int, pictures: int = 0) -> list[str]:
    """What is wrong with a page that is to show so many clips and pictures."""
    found = [*page.console, *page.failed, *page.broken_pictures()]
    found += [url for url in page.requests if not url.startswith(("file:", "data:"))]
    played = page.play()
    found += [f"a clip does not play: {one}" for one in played if one["trouble"]]
    found += [f"a clip shows nothing: {one}" for one in played if not one["width"]]
    found += [f"a clip has not moved: {one}" for one in played if one["frames"] < 2]
    if (len(played), page.pictures()) != (clips, pictures):
        found.append(f"{len(played)} clips and {page.pictures()} pictures")
    for width in (1200, 400):
        page.resize(width)
        if beyond := page.overflow():
            found.append(f"{beyond} px too wide for a window of {width} px")
        if (share := inked(page.screenshot())) < 0.02:
            found.append(f"{share:.1%} of the page is not background")
    return found


def inked(shot: np.ndarray) -> float:
    """Share of the pixels that have another colour than most have."""
    packed = shot.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    _, counts = np.unique(packed, return_counts=True)
    return 1 - float(counts.max()) / packed.size


def test_inspect(chromium: browser.Browser, tiny_t2v: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set")
    (dataset / "clip0.txt").write_text(HOSTILE)
    cache = encode(dataset, tiny_t2v, tmp_path / "shards")
    made = tmp_path / "page.html"
    wanprep(["inspect", "--shards", str(cache), "--html", str(made)], standalone_mode=False)
    shown = chromium.open(made)
    assert not faults(shown, clips=0, pictures=6)
    assert HOSTILE in shown.evaluate("document.body.textContent")


def test_evaluate(chromium: browser.Browser, tmp_path: Path) -> None:
    for side, contrast in (("teacher", 30), ("student", 36)):
        for name in ("waves-seed1", "waves-seed2", f"{LONG_WORD.replace('/', '')[:200]}-seed1"):
            clip = moving(3, contrast=contrast, seed=len(name))
            write_mp4(tmp_path / side / f"{name}.mp4", clip, 16)
    folders = ("--teacher-clips", tmp_path / "teacher", "--student-clips", tmp_path / "student")
    words = ["evaluate", *map(str, folders), "--output", str(tmp_path / "out")]
    wantrain(words, standalone_mode=False)
    assert not faults(chromium.open(tmp_path / "out" / "evaluation.html"), clips=6)


def test_the_demo(chromium: browser.Browser, tmp_path: Path) -> None:
    clips = [moving(2, seed=number) for number in (1, 2)]
    columns = [Column("source", clips), Column("student", clips[::-1], seconds=0.123, passes=4)]
    curves = [Curve("critic <loss>", [1, 2, 3], [3.0, 2.0, 1.5])]
    made = tmp_path / "demo.html"
    made.write_text(page([HOSTILE, "two"], columns, curves, [f"run {LONG_WORD}"], {"seed": "7"}))
    assert not faults(chromium.open(made), clips=4)


def test_a_run(chromium: browser.Browser, whole: Path) -> None:  # noqa: F811
    """With three validation clips after each of two pairs of generator steps."""
    assert not faults(chromium.open(whole / "index.html"), clips=6, pictures=4)


def test_both_experts(
    chromium: browser.Browser,
    tiny_t2v: Path,
    shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    more = ("--boundary-type", "both", "--max-train-steps", "1")
    out = distill(tiny_t2v, shards, tmp_path / "out", *more)
    both = chromium.open(out / "index.html")
    assert not faults(both, clips=0)
    links = both.evaluate("[...document.links].map((link) => link.href)")
    assert len(links) == 2
    for link in links:
        assert not faults(chromium.open(Path(link.removeprefix("file://"))), clips=0, pictures=4)


def test_what_is_wrong_with_a_page_is_seen(chromium: browser.Browser, tmp_path: Path) -> None:
    made = tmp_path / "page.html"
    made.write_text(
        '<!doctype html><p style="width: 900px">wide</p><img src="https://evil.example/x.png">'
        '<video src="data:video/mp4;base64,AAAA" muted></video>'
        '<script>console.log("one"); throw Error("two")</script>'
    )
    found = "\n".join(faults(chromium.open(made), clips=2))
    for said in (
        *("log: one", "Error: two", "https://evil.example/x.png", "Image: net::ERR"),
        *("cannot be decoded", "does not play", "shows nothing", "has not moved"),
        *("1 clips and 1 pictures", "px too wide for a window of 400 px", "is not background"),
    ):
        assert said in found, (said, found)


def test_without_chromium_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AssertionError, match="apt-get install chromium"), browser.running():
        pass
