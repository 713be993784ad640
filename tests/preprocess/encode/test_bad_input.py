"""What goes wrong, what the user reads, and that the good samples survive."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from shared.format.cache import committed_shards
from tests.preprocess.conftest import VIDEOS, Cache, Ran, render_clip, wanprep, write_metadata

FAST = ("--size", 64, "--video-sample-n-frames", 5, "--device", "cpu")


def encode(model: object, data: Path, output: Path, *more: object) -> Ran:
    return wanprep(
        "encode", "--model", model, "--train-data-dir", data, "--output", output, *FAST, *more
    )


@pytest.fixture(scope="module")
def bad_media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A data folder in which each file but two is bad in its own way: file → reason."""
    folder = tmp_path_factory.mktemp("bad")
    bikes = (VIDEOS / "bikes.mp4").read_bytes()
    render_clip(folder / "good.mp4", height=64, width=96, frames=12)
    good = (folder / "good.mp4").read_bytes()
    Image.new("RGB", (64, 64), (200, 30, 90)).save(folder / "good.png")
    png = (folder / "good.png").read_bytes()

    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "cut.mp4").write_bytes(bikes[:200_000])
    # The headers are whole, the frames are not: noticed only when they are decoded.
    data_end = good.index(b"moov") - 4
    (folder / "rotten.mp4").write_bytes(good[:200] + bytes(data_end - 200) + good[data_end:])
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    Image.fromarray(np.full((64, 64), 0.5, dtype=np.float32)).save(folder / "float.tif")
    Image.new("RGB", (3000, 2)).save(folder / "strip.png")
    (folder / "folder.mp4").mkdir()
    reasons = {
        "empty.mp4": "the file is empty (0 bytes)",
        "noise.mp4": "cannot decode the video",
        "cut.mp4": "cannot decode the video",
        "rotten.mp4": "cannot decode",
        "text.mp4": "cannot decode the video",
        "empty.png": "the file is empty (0 bytes)",
        "cut.png": "cannot decode the image",
        "float.tif": "32 bits or floats",
        "strip.png": "side ratio over 16:1",
        "folder.mp4": "cannot decode the video",
        "missing.mp4": "there is no such file",
        "good.png": "the caption is empty",
    }
    entries = [{"file_path": name, "text": "" if "good" in name else "t"} for name in reasons]
    entries += [{"file_path": name, "text": "fine"} for name in ("good.mp4", "good.png")]
    write_metadata(folder, entries)
    return {"": str(folder), **reasons}


def test_bad_media_are_rejected_and_the_rest_goes_on(
    bad_media: dict[str, str], tiny_t2v: Path, tmp_path: Path
) -> None:
    reasons = dict(bad_media)
    data = Path(reasons.pop(""))
    ran = encode(tiny_t2v, data, tmp_path)
    lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
    rejected = {item["source"]: item["reason"] for item in map(json.loads, lines)}
    assert rejected.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in rejected[name], (name, rejected[name])
        if reason not in ("the caption is empty",):
            assert name in rejected[name] or name == "strip.png"
    assert ran.code == 1
    assert "12 rejected, listed in" in ran.err
    assert "accept them with --max-bad 12" in ran.err and "Traceback" not in ran.err
    cache = Cache.open(tmp_path)
    assert [cache.info(row)["caption"] for row in range(2)] == ["fine", "fine"]

    # Accepted, the same run succeeds; one fewer, it does not.
    assert encode(tiny_t2v, data, tmp_path, "--max-bad", 12).code == 0
    assert encode(tiny_t2v, data, tmp_path, "--max-bad", 11).code == 1
    assert len(Cache.open(tmp_path).index) == 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64), (20, 130, 90)).save(folder / "a.png")
    (folder / "a.txt").write_text("a colour")
    return folder


def test_mended_media_leave_the_list(data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    (data / "b.png").touch()
    (data / "b.txt").write_text("another")
    output = tmp_path / "shards"
    assert encode(tiny_t2v, data, output).code == 1
    assert (output / "rejected.jsonl").exists()
    Image.new("RGB", (64, 64), (220, 10, 9)).save(data / "b.png")
    ran = encode(tiny_t2v, data, output)
    assert ran.code == 0 and "1 in the shards, 1 to encode" in ran.err
    assert not (output / "rejected.jsonl").exists()


def test_nothing_usable_says_why(data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    (data / "a.png").write_bytes(b"no")
    ran = encode(tiny_t2v, data, tmp_path / "shards")
    assert ran.code == 1
    assert "has nothing that can be encoded" in ran.err and "cannot decode the image" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--video-sample-n-frames", 6), "the nearest that is: 5"),
        (("--image-sample-size", 7), "--image-sample-size: 7 is not between 32 and 4096"),
        (("--video-sample-size", 9999), "--video-sample-size: 9999 is not between"),
        (("--shard-size-mb", 0), "--shard-size-mb: found 0"),
        (("--max-bad", -1), "--max-bad: found -1"),
    ],
)
def test_bad_options(
    options: tuple[object, ...], message: str, data: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    ran = encode(tiny_t2v, data, tmp_path / "shards", *options)
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("error: ") or "error: " in ran.err
    assert message in ran.err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_weight(path: Path) -> None:
    weights = safetensors.torch.load_file(path)
    del weights[sorted(weights)[0]]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def edit(path: Path, **fields: object) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | fields))


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda m: (m / "model_index.json").unlink(), "has neither a model_index.json"),
    "cut index": (lambda m: truncate(m / "model_index.json"), "is not valid JSON"),
    "no vae config": (lambda m: (m / "vae/config.json").unlink(), "cannot read"),
    "no vae weights": (lambda m: (m / "vae" / WEIGHTS).unlink(), "vae holds no weights"),
    "cut vae": (lambda m: truncate(m / "vae" / WEIGHTS), "cannot read"),
    "vae lacks": (
        lambda m: drop_a_weight(m / "vae" / WEIGHTS),
        f"vae/{WEIGHTS} lacks 1 weights, the first",
    ),
    "cut text encoder": (
        lambda m: truncate(m / "text_encoder/model.safetensors"),
        "cannot read",
    ),
    "text encoder lacks": (
        lambda m: drop_a_weight(m / "text_encoder/model.safetensors"),
        "text_encoder/model.safetensors lacks 1 weights, the first",
    ),
    "cut tokenizer": (
        lambda m: truncate(m / "tokenizer/tokenizer.json"),
        "cannot load tokenizer from",
    ),
    "odd tokenizer": (
        lambda m: edit(m / "model_index.json", tokenizer=["transformers", "NoTokenizer"]),
        "names the tokenizer 'NoTokenizer'",
    ),
    "clip": (lambda m: edit(m / "transformer/config.json", image_dim=1280), "only i2v models take"),
    "first-last": (
        lambda m: edit(m / "transformer/config.json", pos_embed_seq_len=514),
        "expected CLIP image embeddings, the channels of i2v and one expert",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_named(damage: str, data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_t2v, model)
    do, message = DAMAGES[damage]
    do(model)
    ran = encode(model, data, tmp_path / "shards")
    assert ran.code == 1
    assert message in ran.err and str(model) in ran.err
    assert "Traceback" not in ran.err


def test_damaged_shards_are_named_and_can_be_made_again(
    data: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    assert encode(tiny_t2v, data, output).code == 0
    before = Cache.open(output).contents()
    tar = next(output.glob("h64-*.tar"))
    whole = tar.read_bytes()

    def rebuilt() -> Ran:
        return wanprep("index", "--shards", output)

    for bad in (whole[:-1000], whole[:1000], b"", b"x" * len(whole)):
        tar.write_bytes(bad)
        ran = rebuilt()
        assert ran.code == 1
        assert f"{tar} is damaged" in ran.err and "run `wanprep encode` again" in ran.err

    tar.unlink()
    tar.with_suffix(".json").unlink()
    ran = encode(tiny_t2v, data, output)
    assert ran.code == 0, ran.err
    assert Cache.open(output).contents() == before


def test_foreign_shards_are_named(data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert encode(tiny_t2v, data, one).code == 0
    assert encode(tiny_t2v, data, two, "--seed", 5).code == 0
    for path in two.glob("h64-*"):
        shutil.copy(path, one / path.name.replace("w000", "w001"))
    ran = wanprep("index", "--shards", one)
    assert ran.code == 1
    assert "write that name into its `shard`" in ran.err  # as is done here:
    for path in one.glob("*-w001-*.json"):
        path.write_text(path.read_text().replace("w000", "w001"))
    ran = wanprep("index", "--shards", one)
    assert ran.code == 1
    assert "media.seed: shards have" in ran.err

    sidecar = next(one.glob("h64-*w001*.json"))
    edit(sidecar, format=99)
    assert "format version 99, this wandistill reads 1" in wanprep("index", "--shards", one).err
    sidecar.write_text("{")
    assert "is not valid JSON" in wanprep("index", "--shards", one).err


def test_index_without_a_folder(tmp_path: Path) -> None:
    ran = wanprep("index", "--shards", tmp_path / "none")
    assert ran.code == 1 and "--shards: no shards in" in ran.err


def test_a_file_name_that_is_no_text(tiny_t2v: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in (b"caf\xe9.png", b"bad\xe9.png"):
        path = Path(os.fsdecode(os.fsencode(data) + b"/" + name))
        if name.startswith(b"bad"):
            path.touch()
        else:
            Image.new("RGB", (64, 64)).save(path)
        path.with_suffix(".txt").write_text("a café")
    ran = encode(tiny_t2v, data, tmp_path / "shards")
    assert ran.code == 1, ran.err
    assert "1 rejected" in ran.err
    cache = Cache.open(tmp_path / "shards")
    assert cache.info(0)["source"] == r"caf\udce9.png"


def test_leftovers_of_a_killed_run_are_removed(data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    output.mkdir()
    mine = [
        "h64-w64-f1-w001-00007.tar.tmp",
        "h64-w64-f1-w000-00007.tar.tmp",
        "h64-w64-f1-w000-00006.tar",
        "prompts-w000-00003.tar",
    ]
    others = ["notes.tmp", "unrelated.tar"]
    for name in mine + others:
        (output / name).write_bytes(b"half")
    ran = encode(tiny_t2v, data, output)
    assert ran.code == 0, ran.err
    assert not any((output / name).exists() for name in mine)
    assert all((output / name).exists() for name in others)
    assert len(committed_shards(output)) == 2


def test_hostile_names_and_a_tiny_video(tiny_t2v: Path, tmp_path: Path) -> None:
    """One entry each that once ended the whole run; what is good beside them is encoded."""
    data = tmp_path / "data"
    data.mkdir()
    render_clip(data / "good.mp4", height=64, width=96, frames=6)
    render_clip(data / "tiny.mp4", height=2, width=2, frames=6)
    (data / "loop.mp4").symlink_to("loop.mp4")
    names = ["tiny.mp4", "~nobody.mp4", "loop.mp4", "x" * 300 + ".mp4", "good.mp4"]
    write_metadata(data, [{"file_path": name, "text": "a", "type": "video"} for name in names])
    ran = encode(tiny_t2v, data, tmp_path / "shards", "--max-bad", 3)
    assert ran.code == 0, ran.err
    assert sum(sidecar.count for sidecar in committed_shards(tmp_path / "shards")[:1]) == 1
    rejected = (tmp_path / "shards" / "rejected.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["source"]: json.loads(line)["reason"] for line in rejected}
    assert set(reasons) == set(names) - {"good.mp4", "tiny.mp4"}


def test_a_folder_drops_nothing_that_has_a_caption(tiny_t2v: Path, tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
        (folder / "a.txt").write_text(f"in {folder.name}")
    render_clip(data / "a.mp4", height=64, width=96, frames=6)
    render_clip(elsewhere / "a.mp4", height=64, width=96, frames=6, seed=1)
    (data / "linked").symlink_to(elsewhere)
    (data / "linked" / "up").symlink_to(data)  # a loop
    (data / "a.json").write_text("{}")  # a sidecar of a.mp4, not media
    (data / "film.flv").write_bytes(b"x")
    (data / "film.txt").write_text("a film")
    ran = encode(tiny_t2v, data, tmp_path / "shards", "--max-bad", 1)
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "shards" / "rejected.jsonl").read_text())["source"] == "film.flv"
    sources = {info["source"] for info in map(Cache.open(tmp_path / "shards").info, range(2))}
    assert len(sources) == 2


def test_damaged_bytes_are_found_and_never_copied(tiny_t2v: Path, tmp_path: Path) -> None:
    """By `wanprep index`, and before a new caption takes the latents along."""
    data, shards = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    render_clip(data / "a.mp4", height=64, width=96, frames=6)
    (data / "a.txt").write_text("before")
    assert encode(tiny_t2v, data, shards).code == 0
    (tar,) = shards.glob("h*.tar")
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0x55
    tar.chmod(0o644)
    tar.write_bytes(content)
    (data / "a.txt").write_text("after")
    for ran in (wanprep("index", "--shards", shards), encode(tiny_t2v, data, shards)):
        assert ran.code == 1 and f"{tar.name} is damaged" in ran.err, ran.err
    assert len(list(shards.glob("h*.tar"))) == 1


def test_leftovers_are_counted(tiny_t2v: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        render_clip(data / f"{name}.mp4", height=64, width=96, frames=6, seed=ord(name))
        (data / f"{name}.txt").write_text(name)
    assert encode(tiny_t2v, data, tmp_path / "shards").code == 0
    (data / "b.mp4").unlink()
    ran = encode(tiny_t2v, data, tmp_path / "shards")
    assert ran.code == 0 and "leftover 1 in the shards are not in this dataset" in ran.err
