"""`wanprep plan`: what it foretells is what `wanprep encode` then does, and it leaves no trace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.preprocess.conftest import PICTURES, Cache, render_clip, wanprep

Calls = Callable[[], dict[str, int]]
SETTINGS = ("--size", 64, "--video-sample-n-frames", 9, "--video-sample-stride", 2)


@pytest.fixture(autouse=True)
def own_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other runs measured must not be known here."""
    monkeypatch.setenv("WANDISTILL_CACHE", str(tmp_path / "memo"))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long clip, a short one, a picture, one too small; each with a caption."""
    folder = tmp_path_factory.mktemp("planned")
    render_clip(folder / "long.mp4", height=64, width=112, frames=40)
    render_clip(folder / "short.mp4", height=64, width=112, frames=12, seed=1)
    render_clip(folder / "tiny.mp4", height=32, width=56, frames=20, seed=2)
    shutil.copy(PICTURES / "chelsea.png", folder / "cat.png")
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text(f"a caption of {file.name} " * 9)
    return folder


def command(
    name: str, model: Path, media: Path, output: Path, *extra: object
) -> tuple[object, ...]:
    return (
        *(name, "--model", model, "--train-data-dir", media, "--output", output),
        *("--device", "cpu", "--num-workers", 1, *SETTINGS, *extra),
    )


def plan(model: Path, media: Path, output: Path, *extra: object) -> dict[str, Any]:
    ran = wanprep(*command("plan", model, media, output, "--json", *extra))
    assert ran.code == 0, ran.err
    return dict(json.loads(ran.out))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_what_encode_refuses_is_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    """Nothing usable, whatever --max-bad allows; a file in the place of the output folder."""
    data, output = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    (data / "a.mp4").write_bytes(b"no video")
    (data / "a.txt").write_text("a caption")
    for name in ("plan", "encode"):
        ran = wanprep(*command(name, tiny_t2v, data, output, "--max-bad", 9))
        assert ran.code == 1 and "error: dataset: " in ran.err and "can be encoded" in ran.err
    output = tmp_path / "file"
    output.write_text("")
    for name in ("plan", "encode"):
        ran = wanprep(*command(name, tiny_t2v, data, output))
        assert ran.code == 1 and "error: --output: " in ran.err and str(output) in ran.err


def test_what_is_left_out_is_listed_for_scripts_too(
    media: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(media, data)
    for name in (".trash/old.mp4", "notes.pdf", "lost.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("text")
    ran = wanprep(*command("plan", tiny_t2v, data, tmp_path / "shards", "--json"))
    listed = {one["source"]: one["reason"] for one in json.loads(ran.out)["left_out"]}
    assert sorted(listed) == [".trash", "lost.txt", "notes.pdf"]
    for source, reason in listed.items():
        assert f"left out 1 ({reason}): {source}" in ran.err


def test_the_plan_is_what_is_done(
    media: Path, tiny_i2v: Path, tmp_path: Path, count_calls: Calls
) -> None:
    output = tmp_path / "shards"
    calls = count_calls()
    before = plan(tiny_i2v, media, output)
    assert count_calls() == calls and not output.exists()
    assert (before["samples"], before["new"], before["in_shards"]) == (4, 4, 0)
    shapes = {(b["width"], b["height"], b["frames"]): b["samples"] for b in before["buckets"]}
    assert shapes == {(80, 48, 9): 2, (80, 48, 5): 1, (64, 48, 1): 1}
    assert before["shortened"] == [
        {"source": "short.mp4", "change": "9 frames asked, 5 taken of 12"}
    ]
    assert before["upscaled"] == [
        {"source": "tiny.mp4", "change": "56x32 to 80x48, 1.50 times as large"}
    ]
    # Windows of 17, 9 and 17 frames of 40 + 12 + 20.
    assert (before["source_frames"], before["dropped_frames"]) == (72, 72 - 43)

    ran = wanprep(*command("encode", tiny_i2v, media, output))
    assert ran.code == 0, ran.err
    cache = Cache.open(output)
    found = [(i["width"], i["height"], i["frames"]) for i in map(cache.info, range(4))]
    assert {shape: found.count(shape) for shape in found} == shapes
    members = sum(tar.stat().st_size for tar in output.glob("*.tar"))
    ends = 10_240 * len(list(output.glob("*.tar")))  # tar fills up its last record
    assert members - ends <= before["bytes"] <= members

    seen = snapshot(output)
    after = plan(tiny_i2v, media, output)
    assert (after["new"], after["in_shards"], after["bytes"]) == (0, 4, 0)
    assert after["shortened"] == before["shortened"]
    # Another dataset for the same shards: what would be added, what is left over.
    (media / "more").mkdir()
    render_clip(media / "more/new.mp4", height=64, width=64, frames=9)
    (media / "more/new.txt").write_text("new")
    other = plan(tiny_i2v, media / "more", output)
    shutil.rmtree(media / "more")
    assert (other["new"], other["in_shards"], other["leftover"]) == (1, 0, 4)
    assert snapshot(output) == seen

    # The index is stale: it is derived elsewhere, not mended here.
    (output / "manifest.json").unlink()
    seen = snapshot(output)
    assert plan(tiny_i2v, media, output) == after
    assert snapshot(output) == seen


def test_the_time_comes_from_what_was_measured(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    assert plan(tiny_t2v, media, output)["seconds"] is None
    ran = wanprep(*command("plan", tiny_t2v, media, output))
    assert "time     unknown" in ran.out and "--measure" in ran.out
    assert "faster   --vae-dtype bf16" in ran.out
    ran = wanprep(*command("plan", tiny_t2v, media, output), "--vae-dtype", "bf16")
    assert "faster" not in ran.out
    measured = plan(tiny_t2v, media, output, "--measure")["seconds"]
    assert measured > 0 and not output.exists()
    assert plan(tiny_t2v, media, output)["seconds"] == measured  # remembered
    # Twice the samples take longer; another number format was not measured.
    assert plan(tiny_t2v, media, output, "--clips", "chunk")["seconds"] > measured
    assert plan(tiny_t2v, media, output, "--vae-dtype", "bf16")["seconds"] is None
    # A run of encode is a measurement, too.
    (tmp_path / "memo/speed.jsonl").unlink()
    assert wanprep(*command("encode", tiny_t2v, media, output)).code == 0
    assert plan(tiny_t2v, media, tmp_path / "elsewhere")["seconds"] > 0
    assert plan(tiny_t2v, media, output)["seconds"] == 0
    assert "faster" not in wanprep(*command("plan", tiny_t2v, media, output)).out
    # A damaged memo is no reason to fail.
    (tmp_path / "memo/speed.jsonl").write_text('{"by": 1}\n[]\n{"what"\n')
    assert plan(tiny_t2v, media, tmp_path / "elsewhere")["seconds"] is None


def test_what_would_be_rejected_and_the_exit_code(tiny_t2v: Path, tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    render_clip(folder / "good.mp4", height=64, width=112, frames=12)
    (folder / "bad.mp4").write_text("no video")
    for name in ("good", "bad"):
        (folder / f"{name}.txt").write_text(name)
    output = tmp_path / "shards"
    ran = wanprep(*command("plan", tiny_t2v, folder, output))
    assert ran.code == 1
    assert "rejected 1:\n  bad.mp4: " in ran.out and "cannot decode the video" in ran.out
    assert ran.err.splitlines()[-1] == (
        "error: 1 of the dataset would be rejected, more than --max-bad 0. Mend them, or accept "
        "them with --max-bad 1."
    )
    assert wanprep(*command("plan", tiny_t2v, folder, output, "--max-bad", 1)).code == 0
    assert not output.exists()


def test_the_page(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    extra = ("--video-repeat", 3, "--clips", "chunk")
    ran = wanprep(*command("plan", tiny_t2v, media, output, *extra))
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()[1:5]]
    # 40 frames at stride 2 are 20: two chunks of 9. 20 are 10: one of 9. 12 are 6: one of 5.
    assert [row[:-1] for row in rows] == [
        ["64x48,", "image", "1", "0", "1", "0", "0"],
        ["80x48,", "5", "frames", "1", "0", "1", "1", "0"],
        ["80x48,", "9", "frames", "3", "0", "3", "0", "1"],
        ["in", "all", "5", "0", "5", "1", "1"],
    ]
    assert "epoch    13 samples, repeats counted" in ran.out
    assert f"MB more in {output}" in ran.out


def test_other_settings_are_refused_as_encode_refuses_them(
    media: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    assert wanprep(*command("encode", tiny_t2v, media, output)).code == 0
    refused = [
        wanprep(*command(name, tiny_t2v, media, output, "--fix-sample-size", 64, 64))
        for name in ("plan", "encode")
    ]
    assert [ran.code for ran in refused] == [1, 1]
    said = [ran.err[ran.err.index("error:") :] for ran in refused]
    assert said[0] == said[1] and "media.fix_sample_size: shards have 'off'" in said[0]
