"""Interrupted, repeated, edited: the cache is always whole and ends the same."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.format.cache import committed_shards
from shared.format.columns import caption_digest
from shared.format.prompts import read_prompts
from shared.io.store import Store
from tests.preprocess.conftest import REPOSITORY, Cache, wanprep, wanprep_process

# Small shards, so that several are committed in a run: a picture makes about 200 KB.
SETTINGS = ("--size", 256, "--dtype", "fp32", "--shard-size-mb", 1, "--device", "cpu")


def command(model: Path, data: Path, output: Path) -> tuple[object, ...]:
    return ("encode", "--model", model, "--train-data-dir", data, "--output", output, *SETTINGS)


@pytest.fixture(scope="module")
def uninterrupted(
    pictures: Path, tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """The cache of `pictures`, made in one go."""
    output = tmp_path_factory.mktemp("uninterrupted")
    ran = wanprep(*command(tiny_i2v, pictures, output))
    assert ran.code == 0, ran.err
    assert "next: wantrain distill" in ran.out
    cache = Cache.open(output)
    assert len(cache.index) == 12
    assert len(cache.index.shards) >= 3
    return cache


def _first_text(output: Path) -> bool:
    return any(output.glob(".text-*/*/*.safetensors"))


def _second_shard_begun(output: Path) -> bool:
    return any(output.glob("h*.json")) and any(output.glob("h*.tar.tmp"))


@pytest.mark.parametrize(
    ("number", "moment", "code"),
    [
        (signal.SIGKILL, _first_text, -9),
        pytest.param(signal.SIGKILL, _second_shard_begun, -9, marks=pytest.mark.long),
        (signal.SIGTERM, _second_shard_begun, 143),
        pytest.param(signal.SIGINT, _second_shard_begun, 130, marks=pytest.mark.long),
    ],
)
def test_interrupted_and_run_again_it_is_the_same_cache(
    number: signal.Signals,
    moment: Callable[[Path], bool],
    code: int,
    pictures: Path,
    tiny_i2v: Path,
    uninterrupted: Cache,
    tmp_path: Path,
    count_calls: "Calls",
) -> None:
    process = wanprep_process(*command(tiny_i2v, pictures, tmp_path), cwd=REPOSITORY)
    while not moment(tmp_path) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err

    committed = sum(s.count for s in committed_shards(tmp_path) if s.kind == "samples")
    assert committed < 12
    if number != signal.SIGKILL:  # what was encoded is in the shards, and a reader can open them
        assert "To continue, run the same command again" in err
        assert f"interrupted, {12 - committed} samples to go" in err
        assert len(Cache.open(tmp_path).index) == committed > 0
        assert f"{tmp_path}: {committed} sample" in out

    # Captions that were encoded are not encoded again (12 of them, the empty and the negative).
    texts = len(list(tmp_path.glob(".text-*/*/*.safetensors")))
    assert texts > 0
    ran = wanprep(*command(tiny_i2v, pictures, tmp_path))
    assert ran.code == 0, ran.err
    assert count_calls()["UMT5EncoderModel"] == 14 - texts
    assert f"{committed} in the shards, {12 - committed} to encode" in ran.err
    assert Cache.open(tmp_path).contents() == uninterrupted.contents()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".text-*"))


def test_with_nothing_to_do_no_model_is_loaded(
    pictures: Path, tiny_i2v: Path, uninterrupted: Cache
) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in uninterrupted.folder.glob("*.tar"))
    arguments = [str(a) for a in command(tiny_i2v, pictures, uninterrupted.folder)]
    program = (
        "import sys\n"
        "from preprocess.cli.app import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'diffusers', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert "nothing to do" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    after = sorted((p.name, p.stat().st_mtime_ns) for p in uninterrupted.folder.glob("*.tar"))
    assert after == before


def test_a_missing_or_stale_index_is_made_again(
    pictures: Path, tiny_i2v: Path, uninterrupted: Cache, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(uninterrupted.folder, output)
    shutil.rmtree(output / "index.zarr")
    (output / "manifest.json").write_text("{")
    ran = wanprep(*command(tiny_i2v, pictures, output))
    assert ran.code == 0 and "nothing to do" in ran.out, ran.err
    assert Cache.open(output).contents() == uninterrupted.contents()


def test_an_edited_caption_replaces_the_sample(
    pictures: Path, tiny_i2v: Path, uninterrupted: Cache, tmp_path: Path, count_calls: "Calls"
) -> None:
    data, output = tmp_path / "data", tmp_path / "shards"
    shutil.copytree(pictures, data)
    shutil.copytree(uninterrupted.folder, output)
    (data / "2-1.txt").write_text("an edited caption")

    ran = wanprep(*command(tiny_i2v, data, output))
    assert ran.code == 0, ran.err
    assert "11 in the shards, 1 to encode" in ran.err
    assert count_calls() == {"UMT5EncoderModel": 1, "WanEncoder3d": 0}  # the latents were at hand

    cache = Cache.open(output)
    row, old = cache.row(source="2-1.png"), uninterrupted.row(source="2-1.png")
    assert cache.info(row)["caption"] == "an edited caption"
    assert bytes(cache.index.captions[row]) == caption_digest("an edited caption")
    changed = {
        name for name, data_ in cache.contents().items() if uninterrupted.contents()[name] != data_
    }
    key = cache.index.key(row)
    assert key == uninterrupted.index.key(old)
    assert changed == {f"{key}.json", f"{key}.text.safetensors"}

    # Taken back, the first text counts again.
    (data / "2-1.txt").write_bytes((pictures / "2-1.txt").read_bytes())
    assert wanprep(*command(tiny_i2v, data, output)).code == 0
    assert Cache.open(output).contents() == uninterrupted.contents()


def test_duplicates_and_several_captions(
    pictures: Path, tiny_i2v: Path, tmp_path: Path, count_calls: "Calls"
) -> None:
    data, output = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    for name in ("a", "b", "c", "d"):  # one content under four names
        shutil.copy(pictures / "0-0.png", data / f"{name}.png")
    captions = {"a": "first", "b": "second", "c": "first", "d": " first\n"}
    entries = [{"file_path": f"{n}.png", "text": t} for n, t in captions.items()]
    (data / "metadata.json").write_text(json.dumps(entries))
    assert wanprep(*command(tiny_i2v, data, output)).code == 0
    cache = Cache.open(output)
    assert len(cache.index) == 2
    first, second = (cache.row(source="a.png", caption=c) for c in ("first", "second"))
    assert cache.raw(first, "latents.safetensors") == cache.raw(second, "latents.safetensors")
    assert cache.raw(first, "text.safetensors") != cache.raw(second, "text.safetensors")
    # Once for the latents, once for the encoding of zeros.
    assert count_calls()["WanEncoder3d"] == 2

    # A third caption for a clip that is there: text only.
    (data / "metadata.json").write_text(
        json.dumps([*entries, {"file_path": "d.png", "text": "third"}])
    )
    assert wanprep(*command(tiny_i2v, data, output)).code == 0
    assert count_calls()["WanEncoder3d"] == 2
    assert len(Cache.open(output).index) == 3


def test_the_negative_prompt_can_change(
    pictures: Path, tiny_i2v: Path, uninterrupted: Cache, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(uninterrupted.folder, output)
    before = read_prompts(Store(output), Cache.open(output).index.prompt_shards)
    assert [prompt.role for prompt in before] == ["empty", "negative"]
    assert before[0].prompt == "" and before[1].prompt.startswith("色调艳丽，过曝")
    ran = wanprep(*command(tiny_i2v, pictures, output), "--negative-prompt", "ugly")
    assert ran.code == 0, ran.err
    after = read_prompts(Store(output), Cache.open(output).index.prompt_shards)
    assert [(prompt.role, prompt.prompt) for prompt in after[2:]] == [("negative", "ugly")]


@pytest.mark.parametrize(
    ("changed", "field", "old", "new"),
    [
        (("--seed", 43), "media.seed", "42", "43"),
        (("--size", 320), "media.video_sample_size", "256", "320"),
        (("--video-sample-stride", 1), "media.video_sample_stride", "2", "1"),
        (("--dtype", "bf16"), "latents.dtype", "'fp32'", "'bf16'"),
        (("--text-encoder-dtype", "fp32"), "text.compute", "'bf16'", "'fp32'"),
    ],
)
def test_other_settings_are_refused(
    changed: tuple[object, ...],
    field: str,
    old: str,
    new: str,
    pictures: Path,
    tiny_i2v: Path,
    uninterrupted: Cache,
) -> None:
    ran = wanprep(*command(tiny_i2v, pictures, uninterrupted.folder), *changed)
    assert ran.code == 1
    assert f"{field}: shards have {old}, expected {new}" in ran.err
    assert "--output" in ran.err
    assert Cache.open(uninterrupted.folder).contents() == uninterrupted.contents()


def test_another_model_is_refused(pictures: Path, tiny_t2v: Path, uninterrupted: Cache) -> None:
    ran = wanprep(*command(tiny_t2v, pictures, uninterrupted.folder))
    assert ran.code == 1
    assert "mode: shards have 'i2v', expected 't2v'" in ran.err


def test_a_second_writer_is_refused(pictures: Path, tiny_i2v: Path, uninterrupted: Cache) -> None:
    from shared.cache.writer import output_lock

    with output_lock(uninterrupted.folder):
        ran = wanprep(*command(tiny_i2v, pictures, uninterrupted.folder))
    assert ran.code == 1
    assert "another process is writing to" in ran.err


def test_a_full_disk_leaves_a_valid_cache(
    pictures: Path, tiny_i2v: Path, uninterrupted: Cache, tmp_path: Path
) -> None:
    """The system refuses to let any file grow beyond 700 KB: what a full disk looks like to us."""
    arguments = [str(a) for a in command(tiny_i2v, pictures, tmp_path)]
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from preprocess.cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert f"--output: writing to {tmp_path} failed" in done.stderr
    assert "make room" in done.stderr and "Traceback" not in done.stderr
    assert len(Cache.open(tmp_path).index) == 0  # the prompts are there, the torn shard is not
    assert not list(tmp_path.glob("h*"))

    assert wanprep(*command(tiny_i2v, pictures, tmp_path)).code == 0
    assert Cache.open(tmp_path).contents() == uninterrupted.contents()


Calls = Callable[[], dict[str, int]]


def test_captions_keep_their_keys_whichever_goes(
    pictures: Path, tiny_i2v: Path, tmp_path: Path, count_calls: "Calls"
) -> None:
    """A list of captions for one file: encoded once, and no caption ever lies under two keys."""
    shutil.copy(pictures / "0-0.png", tmp_path / "a.png")
    output = tmp_path / "shards"

    def encode_with(*captions: str, prune: bool = False) -> dict[str, str]:
        entry = {"file_path": "a.png", "captions": captions}
        (tmp_path / "metadata.json").write_text(json.dumps([entry]))
        extra = ["--prune"] if prune else []
        ran = wanprep(*command(tiny_i2v, tmp_path, output), *extra)
        assert ran.code == 0, ran.err
        cache = Cache.open(output)
        rows = range(len(cache.index))
        latents = {cache.raw(row, "latents.safetensors") for row in rows}
        assert len(latents) == 1
        keys = {cache.info(row)["caption"]: cache.index.key(row) for row in rows}
        assert len(keys) == len(rows)
        return keys

    first = encode_with("one", "two", "three")
    assert list(first) and len(first) == 3
    assert count_calls() == {"UMT5EncoderModel": 5, "WanEncoder3d": 2}  # clip and condition, once

    # The first one goes: the others stay what they are, nothing is encoded.
    assert encode_with("two", "three", prune=True) == {n: first[n] for n in ("two", "three")}
    # One goes, one comes: it takes the number that is free.
    edited = encode_with("three", "four", "two", prune=True)
    assert edited == {**{n: first[n] for n in ("two", "three")}, "four": first["one"]}
    assert count_calls() == {"UMT5EncoderModel": 6, "WanEncoder3d": 2}
    # An edit replaces, without --prune.
    assert encode_with("three", "4", "two") == {
        **{n: first[n] for n in ("two", "three")},
        "4": first["one"],
    }


def test_too_many_captions(pictures: Path, tiny_i2v: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "0-0.png", tmp_path / "a.png")
    entry = {"file_path": "a.png", "text": [f"caption {n}" for n in range(65)]}
    (tmp_path / "metadata.json").write_text(json.dumps([entry]))
    ran = wanprep(*command(tiny_i2v, tmp_path, tmp_path / "shards"))
    assert ran.code == 1
    assert "a.png: 65 captions for one clip, expected at most 64" in ran.err
