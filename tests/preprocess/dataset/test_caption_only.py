"""Captions without media: lists of them, the bucket that is drawn, their life in a cache."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.torch import load

from preprocess.dataset.clips import ClipRule, caption_clips
from preprocess.dataset.entries import load_dataset
from shared.errors import UserError
from shared.format.buckets import BASE_BUCKETS, Bucket
from shared.format.cache import Sidecar, open_cache
from shared.format.overlays import with_conditions
from shared.format.schema import pack
from shared.io.store import Store
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep

SETTINGS = (
    *("--size", 64, "--video-sample-n-frames", 9, "--video-sample-stride", 1),
    *("--device", "cpu", "--num-workers", 1),
)
PROMPTS = ("a red fox in the snow", "Füchse, 100 %, „im Schnee“", "a calm sea, wide shot")
RULE = ClipRule(
    image_size=96, video_size=64, stride=1, frames=9, seed=42, multiple=16, temporal_stride=4
)


def encode(model: Path, output: Path, *more: object) -> Ran:
    return wanprep("encode", "--model", model, "--output", output, *SETTINGS, *more)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def bucket_of(caption: str) -> tuple[int, int]:
    """(height, width) by the rule of shards/README.md, written out again."""
    drawn = int(sha(f"42:{sha(caption)}:caption bucket"), 16) % 41
    height, width = BASE_BUCKETS[drawn]
    return height * 64 // 512 // 16 * 16, width * 64 // 512 // 16 * 16


def key_of(caption: str, height: int, width: int, frames: int) -> str:
    parts = [sha(caption), {"frames": frames, "size": [height, width]}, 0]
    return sha(json.dumps(parts, sort_keys=True, separators=(",", ":")))[:32]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("list") / "prompts.txt"
    path.write_text("\n\n".join((*PROMPTS, PROMPTS[0])) + "\r\n", encoding="utf-8-sig")
    return path


@pytest.fixture(scope="module")
def encoded(prompts: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("encoded") / "shards"
    ran = encode(tiny_t2v, output, "--train-data-meta", prompts)
    assert ran.code == 0, ran.err
    return output


def test_what_is_in_the_shards(encoded: Path) -> None:
    """As plain webdataset reads them: JSON and text, in one bucket a tar."""
    found = {}
    for tar in encoded.glob("h*.tar"):
        buckets = set()
        for sample in webdataset.WebDataset([str(tar)], shardshuffle=False):
            info = json.loads(sample["json"])
            assert {name for name in sample if not name.startswith("__")} == {
                *("json", "text.safetensors"),
            }
            buckets.add((info["height"], info["width"], info["frames"]))
            found[info.pop("caption")] = sample["__key__"], info
            assert load(sample["text.safetensors"])["text"].shape[1] == 32
        assert len(buckets) == 1
    assert found.keys() == set(PROMPTS)  # a line that occurs twice is one sample
    for caption, (key, info) in found.items():
        height, width = bucket_of(caption)
        assert info == {
            **{"type": "text", "source": "", "width": width, "height": height, "frames": 9},
            **{"frame_indices": [], "fps": None, "tags": []},
            **{"source_width": None, "source_height": None},
        }
        assert key == key_of(caption, height, width, 9)
    index = open_cache(Store(encoded))
    assert (index.types == 2).all() and (index.lengths[:, 1] == 0).all()
    assert (index.lengths[:, (0, 2)] > 0).all()


def test_no_vae_is_built(
    prompts: Path, tiny_t2v: Path, tmp_path: Path, count_calls: Callable[[], dict[str, int]]
) -> None:
    """And every form of a list gives the same; the text is that of a media file's caption."""
    listed = [{"text": prompt} for prompt in PROMPTS]
    (tmp_path / "a.json").write_text(json.dumps(listed))
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"caption": prompt, "type": "text"}) for prompt in PROMPTS)
    )
    quoted = "\n".join(f'"{prompt}",text' for prompt in PROMPTS)
    (tmp_path / "c.csv").write_text(f"caption,type\n{quoted}\n")
    shards = tmp_path / "shards"
    assert encode(tiny_t2v, shards, "--train-data-meta", prompts).code == 0
    calls = count_calls()
    assert calls["WanEncoder3d"] == 0 and calls["UMT5EncoderModel"] == len(PROMPTS) + 2
    for name in ("a.json", "b.jsonl", "c.csv"):
        ran = encode(tiny_t2v, shards, "--train-data-meta", tmp_path / name)
        assert "nothing to do" in ran.out, ran.err
    Image.new("RGB", (64, 64), (10, 200, 90)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text(PROMPTS[1])
    (tmp_path / "a.json").rename(tmp_path / "other.json")
    assert encode(tiny_t2v, tmp_path / "media", "--train-data-dir", tmp_path).code == 0
    cache, media = Cache.open(shards), Cache.open(tmp_path / "media")
    own = cache.raw(cache.row(source="", caption=PROMPTS[1]), "text.safetensors")
    assert own == media.raw(media.row(source="x.png"), "text.safetensors")


def loaded(path: Path, *entries: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """(type, caption) of the entries; the reasons of what is rejected."""
    (path / "list.json").write_text(json.dumps(entries))
    dataset = load_dataset(path, path / "list.json")
    return [(e.type, e.caption) for e in dataset.entries], [r.reason for r in dataset.rejected]


def test_what_counts_as_a_caption_alone(tmp_path: Path) -> None:
    """Said by the entry, or by the whole list: no path anywhere, and nothing that may be one."""
    assert loaded(tmp_path, {"text": "a"}, {"caption": "b", "width": 96, "height": 64})[0] == [
        *(("text", "a"), ("text", "b")),
    ]
    media = {"file_path": "a.mp4", "text": "a"}
    assert loaded(tmp_path, media, {"text": "b", "type": "text"}) == (
        [("video", "a"), ("text", "b")],
        [],
    )
    said = 'a caption that stands for itself says so: "type": "text"'
    for other in (media, {"path": "b.mp4", "text": "b"}, {"text": "b", "type": "video"}):
        entries, reasons = loaded(tmp_path, {"text": "t"}, other)
        assert ("text", "t") not in entries and said in reasons[0], reasons
    assert loaded(tmp_path, {"text": ["a", "b"], "type": "text"})[0] == [
        ("text", "a"),
        ("text", "b"),
    ]
    bad = {
        "type is 'text' and file_path is given": {"file_path": "a.mp4"},
        "of width and height only one is given": {"width": 64},
        "frames is 0, expected a whole number from 1": {"frames": 0},
        'frames is "x", expected a whole number from 1': {"frames": "x"},
        "height is true": {"width": 64, "height": True},
        "the caption is empty": {"text": " "},
    }
    for reason, entry in bad.items():
        entries, reasons = loaded(tmp_path, {"text": "t", "type": "text", **entry})
        assert entries == [] and reasons[0].startswith(reason), reasons


def test_a_shape_that_the_entry_asks_for() -> None:
    """The bucket that a video of that shape would get; frames floored, never more than asked."""

    def bucket(rule: ClipRule = RULE, **asked: Any) -> Bucket:
        (clip,) = caption_clips(sha("x"), rule, **{"shape": None, "frames": None} | asked)
        return clip.bucket

    assert bucket(shape=(1080, 1920)) == bucket(shape=(9, 16)) == Bucket(48, 80, 9)
    assert bucket(shape=(9, 9), frames=8).frames == 5
    assert bucket(frames=200).frames == 9 and bucket(frames=1).frames == 1
    fixed = ClipRule(**{**RULE.__dict__, "fixed_size": (70, 100)})
    assert bucket(fixed, shape=(9, 16)) == Bucket(64, 96, 9)
    square = ClipRule(**{**RULE.__dict__, "buckets": False})
    assert bucket(square) == Bucket(64, 64, 9)


def test_all_buckets_are_drawn_alike_and_from_the_budgets_sizes() -> None:
    drawn = [
        caption_clips(sha(f"caption {n}"), RULE, shape=None, frames=None)[0] for n in range(4100)
    ]
    big = ClipRule(**{**RULE.__dict__, "video_size": 512})
    times = np.zeros(len(BASE_BUCKETS))
    for n in range(4100):
        (clip,) = caption_clips(sha(f"caption {n}"), big, shape=None, frames=None)
        times[BASE_BUCKETS.index((clip.bucket.height, clip.bucket.width))] += 1
    assert ((times - 100) ** 2 / 100).sum() < 74  # chi squared of 40, one in a thousand
    assert {clip.bucket.frames for clip in drawn} == {9}
    # As in VideoX-Fun: with random_hw_adapt and a budget, every size from video's to image's.
    budget = ClipRule(
        **{
            **{**RULE.__dict__, "video_size": 256, "image_size": 512, "frames": 49},
            **{"adapt": True, "token_budget": True, "token_size": 256, "buckets": False},
        }
    )
    buckets = {
        caption_clips(sha(f"c{n}"), budget, shape=None, frames=None)[0].bucket for n in range(60)
    }
    assert buckets == {Bucket(256, 256, 49), Bucket(384, 384, 21), Bucket(512, 512, 9)}
    several = ClipRule(**{**budget.__dict__, "variants": 8})
    assert len(caption_clips(sha("c"), several, shape=None, frames=None)) in (2, 3)


def test_a_plan_of_captions_alone(
    prompts: Path, encoded: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    """Samples, buckets, bytes as the cache then has them; no VAE's time."""
    asked = ("--train-data-meta", prompts, "--output", tmp_path / "s", *SETTINGS, "--json")
    ran = wanprep("plan", "--model", tiny_t2v, *asked)
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    index = open_cache(Store(encoded))
    assert (plan["samples"], plan["new"], plan["upscaled"]) == (3, 3, [])
    assert {(b["height"], b["width"], b["frames"]) for b in plan["buckets"]} == {
        (bucket.height, bucket.width, bucket.frames) for bucket in index.buckets
    }
    written = sum(tar.stat().st_size for tar in encoded.glob("*.tar"))
    assert 0.5 * written < plan["bytes"] < written
    assert wanprep("plan", "--model", tiny_i2v, *asked).code == 1


def test_an_edited_caption_is_a_new_sample(encoded: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(encoded, tmp_path / "shards"))
    (tmp_path / "p.txt").write_text("\n".join((*PROMPTS[1:], "something new")))
    ran = encode(tiny_t2v, shards, "--train-data-meta", tmp_path / "p.txt")
    assert ran.code == 0 and "leftover 1 in the shards" in ran.err
    ran = encode(tiny_t2v, shards, "--train-data-meta", tmp_path / "p.txt", "--prune")
    assert "1 sample removed" in ran.out
    assert wanprep("compact", "--shards", shards).code == 0
    assert wanprep("index", "--shards", shards).code == 0
    cache = Cache.open(shards)
    captions = {cache.info(row)["caption"] for row in range(len(cache.index))}
    assert captions == {*PROMPTS[1:], "something new"}
    before = Cache.open(encoded).contents()
    kept = {name: data for name, data in cache.contents().items() if name in before}
    assert kept and all(before[name] == data for name, data in kept.items())
    assert "captions alone)" in wanprep("index", "--shards", shards).out


@pytest.fixture(scope="module")
def mixed(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A t2v cache of a video and of two captions beside it; its data folder is its parent."""
    folder = tmp_path_factory.mktemp("mixed")
    render_clip(folder / "a.mp4", height=48, width=96, frames=9)
    lines = [
        {"file_path": "a.mp4", "text": "a video"},
        {"text": "alone", "type": "text", "width": 96, "height": 48},
        {"text": "drawn", "type": "text"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ran = encode(tiny_t2v, folder / "shards", "--train-data-dir", folder)
    assert ran.code == 0, ran.err
    return folder / "shards"


def test_beside_media(mixed: Path, tiny_t2v: Path) -> None:
    """In the same bucket, in the same tar; sound, and foreseen."""
    ran = wanprep("verify", "--shards", mixed)
    assert ran.code == 0, ran.out
    cache = Cache.open(mixed)
    infos = {cache.info(row)["caption"]: cache.info(row) for row in range(len(cache.index))}
    assert {caption: info["type"] for caption, info in infos.items()} == {
        **{"a video": "video", "alone": "text", "drawn": "text"},
    }
    video, alone = infos["a video"], infos["alone"]
    assert [video[n] for n in ("height", "width")] == [alone[n] for n in ("height", "width")]
    assert len({cache.index.shard_ids[cache.row(source="a.mp4")]}) == 1


def test_recaption_and_add_condition_leave_them(
    mixed: Path, tiny_i2v: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(mixed, tmp_path / "shards"))
    (tmp_path / "new.jsonl").write_text('{"file_path": "a.mp4", "text": "new"}')
    ran = wanprep(
        *("recaption", "--model", tiny_t2v, "--shards", shards, "--name", "new", "--device", "cpu"),
        *("--train-data-dir", mixed.parent, "--train-data-meta", tmp_path / "new.jsonl"),
    )
    assert ran.code == 0 and "without a caption" not in ran.out + ran.err
    assert len(open_cache(Store(shards / "captions/new"))) == 1
    command = ("--shards", shards, "--device", "cpu", "--train-data-dir", mixed.parent)
    ran = wanprep("add-condition", "--model", tiny_i2v, *command)
    assert ran.code == 0, ran.err
    assert len(with_conditions(open_cache(Store(shards)), "m").overlays) == 1
    assert "samples  1: 1 have a condition, 0" in wanprep(
        "add-condition", "--model", tiny_i2v, *command
    ).err  # fmt: skip


def test_what_a_cache_of_nothing_else_says(
    encoded: Path, prompts: Path, tiny_i2v: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(encoded, tmp_path / "shards"))
    (tmp_path / "new.jsonl").write_text('{"file_path": "a.mp4", "text": "new"}')
    (tmp_path / "a.mp4").touch()
    where = ("--shards", shards, "--train-data-dir", tmp_path, "--device", "cpu")
    ran = wanprep("add-condition", "--model", tiny_i2v, *where)
    assert ran.code == 1 and "there is no first frame to encode" in ran.err
    recaption = ("recaption", "--model", tiny_t2v, "--name", "x", *where)
    ran = wanprep(*recaption, "--train-data-meta", tmp_path / "new.jsonl")
    assert ran.code == 1 and "are text-only: their captions stay as they are" in ran.err
    assert not (shards / "captions").exists() and not (shards / "conditions").exists()
    ran = wanprep(*recaption, "--same-captions")
    assert ran.code == 0 and "3 captions" in ran.out, ran.err
    ran = wanprep("remove", "--shards", shards, "--sample", "nope*")
    assert ran.code == 1 and "e.g. 'clips/a.mp4'" in ran.err


def test_an_i2v_model_is_refused(prompts: Path, tiny_i2v: Path, tmp_path: Path) -> None:
    ran = encode(tiny_i2v, tmp_path / "s", "--train-data-meta", prompts)
    assert ran.code == 1 and "has 4 text-only captions" in ran.err
    assert not list(tmp_path.rglob("*.tar"))
    ran = encode(tiny_i2v, tmp_path / "s", "--train-data-meta", prompts, "--train-mode", "normal")
    assert ran.code == 0, ran.err


def test_in_a_file_of_datasets(prompts: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nmetadata = "{prompts}"\nresolution = 96\n'
        "target_frames = [1, 5]\nnum_repeats = 2\n"
    )
    ran = encode(tiny_t2v, tmp_path / "s", "--dataset-config", tmp_path / "d.toml")
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "s")
    infos = [cache.info(row) for row in range(len(cache.index))]
    assert sorted(info["frames"] for info in infos) == [1, 1, 1, 5, 5, 5]
    assert {info["repeats"] for info in infos} == {2}
    assert {info["source"] for info in infos} == {""}
    assert max(info["width"] * info["height"] for info in infos) > 64 * 64 * 1.5
    (tmp_path / "d.toml").write_text(f'[[datasets]]\nvideo_jsonl_file = "{prompts}"\n')
    ran = encode(tiny_t2v, tmp_path / "t", "--dataset-config", tmp_path / "d.toml")
    assert ran.code == 1 and "a text-only caption among videos" in ran.err


@pytest.mark.parametrize(
    ("kind", "has_latents", "problem"),
    [("video", False, "has no latents.safetensors"), ("text", True, "but has latents")],
)
def test_a_tar_of_samples_that_cannot_be(
    kind: str, has_latents: bool, problem: str, mixed: Path, tmp_path: Path
) -> None:
    """Only captions lie in a cache without latents, and only without them."""
    shards = Path(shutil.copytree(mixed, tmp_path / "shards"))
    cache = Cache.open(shards)
    row = cache.row(source="a.mp4")
    tar = shards / cache.index.shards[cache.index.shard_ids[row]]
    key, text = cache.index.key(row), cache.tensor(row, "text")
    info = {**cache.info(row), "type": kind}
    members = {f"{key}.json": json.dumps(info).encode()}
    if has_latents:
        members[f"{key}.latents.safetensors"] = pack(latents=cache.tensor(row, "latents"))
    members[f"{key}.text.safetensors"] = pack(text=text)
    with webdataset.TarWriter(str(tar), encoder=False, mtime=0) as writer:
        for name, data in members.items():
            writer.write({"__key__": name.split(".")[0], name.split(".", 1)[1]: data})
    sidecar = json.loads(Sidecar.path_for(tar).read_text())
    content = tar.read_bytes()
    sidecar |= {"count": 1, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    Sidecar.path_for(tar).write_text(json.dumps(sidecar))
    ran = wanprep("index", "--shards", shards)
    assert ran.code == 1 and problem in ran.err, ran.err
    ran = wanprep("verify", "--shards", shards)
    assert ran.code == 1 and "latents.safetensors" in ran.out, ran.out


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="lists nothing"):
        load_dataset(tmp_path, tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_dataset(tmp_path, tmp_path / "b.txt")
    (tmp_path / "c.csv").write_text("caption,path\na,b.mp4\n")
    with pytest.raises(UserError, match="has no path column: its first line names caption, path"):
        load_dataset(tmp_path, tmp_path / "c.csv")
