"""`wanprep inspect`: its numbers against the tars themselves, its page against hostile captions."""

import base64
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load

from preprocess.inspection.html import HistogramChart, templates
from preprocess.inspection.overview import Histogram, drawn_across_buckets, histogram, overview
from shared.io.store import Store
from tests.html_page import Parsed
from tests.models import tiny_model
from tests.preprocess.conftest import Cache, render_clip, wanprep

HOSTILE = (
    '</p><script>alert(1)</script><img src=http://evil.example/x onerror="alert(2)"> '
    "{{ cards }} {% raw %} \x1b[31mred\x07 \u202e txt.exe &amp; \"'"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Two datasets: clips of two lengths, shown three times an epoch, and images; one edited."""
    folder = tmp_path_factory.mktemp("inspect")
    clips, stills, shards = folder / "clips", folder / "stills", folder / "shards"
    clips.mkdir()
    stills.mkdir()
    for number, frames in enumerate((40, 30, 12)):
        render_clip(clips / f"{number}.mp4", height=64, width=96, frames=frames, seed=number)
        (clips / f"{number}.txt").write_text(HOSTILE if number < 2 else "the same words")
    for name in ("0-0", "1-1", "2-1"):
        shutil.copy(pictures / f"{name}.png", stills)
        (stills / f"{name}.txt").write_text("word " * 700 if name == "0-0" else f"a still {name}")
    config = folder / "datasets.toml"
    config.write_text(
        f'[[datasets]]\nvideo_directory = "{clips}"\nnum_repeats = 3\n'
        f'[[datasets]]\nimage_directory = "{stills}"\n'
    )
    model = tiny_model(folder / "model", "i2v")
    encode = ("encode", "--model", model, "--dataset-config", config, "--output", shards)
    options = ("--size", 64, "--video-sample-n-frames", 13, "--device", "cpu")
    assert wanprep(*encode, *options).code == 0
    (stills / "1-1.txt").write_text("edited")
    assert wanprep(*encode, *options).code == 0
    same = ("--same-captions", "--model", model, "--device", "cpu")
    assert wanprep("recaption", "--name", "again", "--shards", shards, *same).code == 0
    return shards


def from_tars(shards: Path) -> dict[str, dict[str, bytes]]:
    """Key → suffix → bytes of the live samples, by tarfile, newer shards over older ones."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(shards.glob("h*.tar"), key=lambda path: path.stem[-5:]):
        with tarfile.open(path) as tar:
            own: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, suffix = member.name.partition(".")
                own.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
        found |= own
    return found


def test_the_numbers_are_those_of_the_tars(shards: Path) -> None:
    found, samples = overview(Store(shards), seed=0), from_tars(shards)
    infos = [json.loads(sample["json"]) for sample in samples.values()]
    tokens = [len(load(sample["text.safetensors"])["text"]) for sample in samples.values()]
    assert found.samples == 6 and found.types == {"video": 3, "image": 3, "text": 0}
    assert found.epoch == 3 * 3 + 3
    assert sorted(found.tokens) == sorted(tokens)
    for suffix in ("json", "latents.safetensors", "text.safetensors", "cond.safetensors"):
        total = sum(len(sample[suffix]) for sample in samples.values())
        assert found.bytes[suffix.partition(".")[0]] == total
    files = [path for path in shards.glob("*") if re.search(r"-w\d{3}-\d{5}\.", path.name)]
    derived = [p for p in (shards / "index.zarr").rglob("*") if p.is_file()]
    everything = sum(p.stat().st_size for p in [*files, *derived, shards / "manifest.json"])
    assert sum(found.bytes.values()) == everything
    seconds = [
        len(i["frame_indices"]) * (i["frame_indices"][1] - i["frame_indices"][0]) / i["fps"]
        for i in infos
        if i["type"] == "video"
    ]
    assert sorted(found.seconds) == pytest.approx(sorted(seconds))
    assert sorted({round(one, 3) for one in seconds}) == [0.625, 1.625]  # 5 and 13 frames, 16/s
    for row in found.buckets:
        own = [
            (info, n)
            for info, n in zip(infos, tokens, strict=True)
            if (info["height"], info["width"], info["frames"])
            == (row.bucket.height, row.bucket.width, row.bucket.frames)
        ]
        assert row.samples == len(own) > 0
        assert row.epoch == sum(info.get("repeats", 1) for info, _ in own)
        assert row.tokens == pytest.approx(sum(n for _, n in own) / len(own))


def test_captions_are_counted(shards: Path) -> None:
    said = overview(Store(shards), seed=0).captions
    assert (said.distinct, said.empty, said.at_token_limit) == (5, 0, 1)
    assert (said.most_common, said.most_common_samples) == (HOSTILE, 2)
    assert said.longest == 512


def test_dead_bytes_are_what_compact_frees(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    cache = Cache.open(copy)
    key = cache.index.key(cache.row(source=cache.info(0)["source"]))
    assert wanprep("remove", "--sample", key, "--shards", copy).code == 0
    found = overview(Store(copy), seed=0)
    assert found.dead == 2 and found.tombstones == 1  # the edited caption's old sample, this one
    overlay = found.overlays[0]
    assert (overlay.name, overlay.samples, overlay.lacking) == ("captions/again", 6, 0)
    assert overlay.orphans == 1
    before = sum(path.stat().st_size for path in copy.glob("*.tar"))
    said = wanprep("inspect", "--shards", copy).out
    assert "2 samples" in said and "wanprep compact" in said
    assert wanprep("compact", "--shards", copy).code == 0
    assert before - sum(path.stat().st_size for path in copy.glob("*.tar")) == found.dead_bytes > 0
    assert overview(Store(copy), seed=0).dead == 0


def test_many_videos_are_drawn_from(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.inspection.overview.MOST_READ", 2)
    found = overview(Store(shards), seed=0)
    assert (len(found.seconds), found.seconds_of) == (2, 3)
    assert "2 drawn of 3 videos" in wanprep("inspect", "--shards", shards).out


def test_the_terminal_shows_it_all_and_obeys_no_caption(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    ran = wanprep("inspect", "--shards", copy)
    assert ran.code == 0
    for said in ("6 (3 video, 3 image)", "12 samples, repeats counted", "captions/again", "R²"):
        assert said in ran.out, said
    assert "mode" in ran.out and "i2v" in ran.out and "16×4×" in ran.out
    assert "2 samples have “</p><script>" in ran.out
    assert "\x1b" not in ran.out and "\x07" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 110


@pytest.fixture(scope="module")
def html(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "cache.html"
    ran = wanprep("inspect", "--shards", shards, "--html", path)
    assert ran.code == 0 and f"{path}: 6 samples" in ran.out
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_and_runs_nothing(html: str) -> None:
    for tag, attributes in Parsed(html).tags:
        assert tag not in ("script", "link", "iframe", "object", "form", "a")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "poster", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html  # what a browser holds even a mistake of ours to


def test_a_hostile_caption_is_text(html: str) -> None:
    parsed = Parsed(html)
    assert HOSTILE in parsed.text
    assert parsed.text.count(HOSTILE) == 2
    titles = [attributes["title"] for _, attributes in parsed.tags if attributes.get("title")]
    assert HOSTILE in titles
    assert [tag for tag, _ in parsed.tags].count("img") == 6 == html.count("<article>")


def test_a_picture_is_the_latents_through_the_map(html: str, shards: Path) -> None:
    cache = Cache.open(shards)
    manifest = json.loads((shards / "manifest.json").read_text())["latent_rgb"]
    weight, bias = torch.tensor(manifest["weight"]), torch.tensor(manifest["bias"])
    pictures = re.findall(r'<img src="data:image/webp;base64,([^"]+)".*?class="key">(\w+)<', html)
    assert len(pictures) == 6
    for encoded, key in pictures:
        (row,) = (n for n in range(6) if cache.index.key(n) == key)
        latents = cache.tensor(row, "latents").double()
        wanted = ((torch.einsum("cthw,cr->thwr", latents, weight.double()) + bias) + 1) * 127.5
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
            duration = image.info.get("duration")
        assert len(frames) == len(wanted)
        for frame, own in zip(frames, wanted.clamp(0, 255).numpy(), strict=True):
            small = frame.resize(own.shape[1::-1], Image.Resampling.BOX)
            assert np.abs(np.asarray(small) - own).mean() < 8
        info = cache.info(row)
        if info["type"] == "video":  # moves at the clip's own speed
            seconds = info["frames"] * 2 / info["fps"]
            assert duration == pytest.approx(1000 * seconds / len(frames), abs=1)


def test_a_map_that_misleads_is_warned_of(shards: Path, tmp_path: Path) -> None:
    copy, page = Path(shutil.copytree(shards, tmp_path / "shards")), tmp_path / "page.html"
    path = copy / "manifest.json"
    for r2, warned, pictures in ((0.31, "31%", 6), (0.93, None, 6), (None, None, 6)):
        manifest = json.loads(path.read_text())
        manifest["latent_rgb"]["r2"] = r2
        path.write_text(json.dumps(manifest))
        ran = wanprep("inspect", "--shards", copy, "--html", page)
        html = page.read_text()
        assert ("WARNING: below 0.5" in " ".join(ran.out.split())) == (warned is not None)
        assert ('class="warning"' in html) == (warned is not None)
        assert warned is None or warned in html
        assert html.count("<img") == pictures
        assert ("R² unknown" in html) == (r2 is None)
    manifest["latent_rgb"] = None
    path.write_text(json.dumps(manifest))
    assert "no latent → RGB map" in wanprep("inspect", "--shards", copy, "--html", page).out
    assert page.read_text().count("no preview") == 6 and "<img" not in page.read_text()


def test_samples_are_drawn_across_the_buckets(shards: Path) -> None:
    index = Cache.open(shards).index
    few = len(index.buckets)
    assert {int(index.bucket_ids[row]) for row in drawn_across_buckets(index, few, seed=1)} == set(
        range(few)
    )
    draws = {tuple(drawn_across_buckets(index, few, seed=seed)) for seed in range(8)}
    assert len(draws) > 1
    assert sorted(drawn_across_buckets(index, 99, seed=0)) == list(range(6))
    assert drawn_across_buckets(index, 0, seed=0) == []


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [
        ([], (0, 1), (0,)),
        ([6, 6, 6], (6, 7), (3,)),
        ([0], (0, 1), (1,)),
        ([1, 2, 2, 11], tuple(range(13)), (0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1)),
        ([5.0625], (5.0, 5.5), (1,)),
        ([100, 110, 120], (100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122), None),
    ],
)
def test_histograms(
    values: list[float], edges: tuple[float, ...], counts: tuple[int, ...] | None
) -> None:
    found = histogram(values)
    assert found.edges == pytest.approx(edges)
    assert sum(found.counts) == len(values)
    assert counts is None or found.counts == counts


def test_a_chart_has_axes_with_units() -> None:
    bars = Histogram(edges=(0, 10, 20), counts=(3, 5))
    chart = HistogramChart("Text tokens", bars, "tokens", "samples")
    charts = templates().get_template("inspect_charts.html").module
    svg = charts.histogram_chart(chart)  # type: ignore[attr-defined]
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert heights[0] / heights[1] == pytest.approx(3 / 5, rel=1e-3)
    assert ">tokens<" in svg and ">samples<" in svg
    assert all(f">{edge}<" in svg for edge in (0, 10, 20))


def test_captions_alone(tmp_path: Path) -> None:
    listed = tmp_path / "captions.jsonl"
    listed.write_text("".join(json.dumps({"text": f"caption {n}"}) + "\n" for n in range(3)))
    model, shards, page = tmp_path / "model", tmp_path / "shards", tmp_path / "page.html"
    encode = ("encode", "--model", tiny_model(model, "t2v"), "--train-data-meta", listed)
    ran = wanprep(*encode, "--output", shards, "--size", 64, "--device", "cpu")
    assert ran.code == 0, ran.err
    ran = wanprep("verify", "--shards", shards, "--decode", 2, "--model", model)
    assert ran.code == 0 and "3 samples in" in ran.out, ran.out + ran.err
    ran = wanprep("inspect", "--shards", shards, "--html", page)
    assert ran.code == 0 and "3 text-only" in ran.out
    assert "text-only samples have no images" in page.read_text()
    assert page.read_text().count("<article>") == 3
