"""Captions and conditions added to a cache later: what a direct encode makes, no latents moved."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.format.cache import MemberReader, open_cache
from shared.format.overlays import captions_of, positions, with_captions, with_conditions
from shared.format.prompts import read_prompts
from shared.io.store import Store
from tests.models import tiny_model
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep

SETTINGS = (
    "--size",
    64,
    "--video-sample-n-frames",
    9,
    "--video-sample-stride",
    1,
    "--device",
    "cpu",
)
Calls = Callable[[], dict[str, int]]


def encode(model: Path, data: Path, output: Path, *more: object) -> Ran:
    return wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--output", output),
        *(*SETTINGS, *more),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of different shape, three pictures, captions beside them."""
    folder = tmp_path_factory.mktemp("data")
    render_clip(folder / "wide.mp4", height=48, width=96, frames=13)
    render_clip(folder / "tall.mp4", height=96, width=64, frames=11, seed=1)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for path in sorted(folder.glob("*.[mp]*")):
        path.with_suffix(".txt").write_text(f"the file {path.name}, [in brackets]")
    return folder


@pytest.fixture(scope="module")
def encoded(data: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The t2v cache of `data`; tests copy it."""
    output = tmp_path_factory.mktemp("encoded") / "shards"
    ran = encode(tiny_t2v, data, output)
    assert ran.code == 0, ran.err
    return output


@pytest.fixture
def shards(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "shards"))


def captions_list(path: Path, captions: dict[str, str]) -> Path:
    lines = [json.dumps({"file_path": name, "text": text}) for name, text in captions.items()]
    path.write_text("\n".join(lines))
    return path


def files(folder: Path) -> dict[str, bytes]:
    """The cache itself, without what lies beside it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def members(folder: Path, name: str | None, member: str) -> dict[str, bytes]:
    """Source → bytes, as training would read them."""
    index = open_cache(Store(folder))
    index = with_captions(index, name) if name is not None else index
    reader = MemberReader(index)
    try:
        return {reader.info(row)["source"]: reader.raw(row, member) for row in range(len(index))}
    finally:
        reader.close()


NEW = {"wide.mp4": "wide, once more", "tall.mp4": "tall", "0.png": "nought", "1.png": "one"}


def test_recaption_encodes_text_only_and_equals_an_encode_of_those_captions(
    data: Path, shards: Path, tiny_t2v: Path, tmp_path: Path, count_calls: Calls
) -> None:
    before = files(shards)
    listed = captions_list(tmp_path / "new.jsonl", NEW | {"2.png": "two"})
    command = ("recaption", "--shards", shards, "--model", tiny_t2v, "--device", "cpu")
    short = (*command, "--name", "short", "--train-data-dir", tmp_path / "no-media-here")
    ran = wanprep(*short, "--train-data-meta", listed)
    assert ran.code == 1 and "no folder" in ran.err  # the list's media are nowhere: a wrong folder?
    (tmp_path / "empty").mkdir()  # relative paths start somewhere; no file is looked for
    short = (*command, "--name", "short", "--train-data-dir", tmp_path / "empty")
    ran = wanprep(*short, "--train-data-meta", listed)
    assert ran.code == 0, ran.err
    assert f"{shards}/captions/short: 5 captions, 5 of them new" in ran.out
    assert "next: wantrain distill --captions short" in ran.out
    assert count_calls() == {"UMT5EncoderModel": 5 + 2, "WanEncoder3d": 0}
    after = files(shards)
    assert {name: after[name] for name in before} == before

    direct = tmp_path / "direct"
    assert encode(tiny_t2v, data, direct, "--train-data-meta", listed).code == 0
    vae = count_calls()["WanEncoder3d"]
    for member in ("text.safetensors", "latents.safetensors"):
        assert members(shards, "short", member) == members(direct, None, member)
    overlay, other = Cache.open(captions_of(Store(shards), "short").folder), Cache.open(direct)
    assert {n: d for n, d in overlay.contents().items() if n.endswith("json")} == {
        n: d for n, d in other.contents().items() if n.endswith("json")
    }
    for one, two in zip(
        read_prompts(Store(overlay.folder), overlay.index.prompt_shards),
        read_prompts(Store(direct), other.index.prompt_shards),
        strict=True,
    ):
        assert (one.role, one.prompt) == (two.role, two.prompt) and torch.equal(one.text, two.text)

    # Again: nothing to do. One edited: one encoded. Another name beside it: the first stays.
    calls = count_calls()["UMT5EncoderModel"]
    ran = wanprep(*short, "--train-data-meta", listed)
    assert ran.code == 0 and "5 captions, 0 of them new" in ran.out
    captions_list(listed, NEW | {"2.png": "two, edited"})
    ran = wanprep(*short, "--train-data-meta", listed)
    assert ran.code == 0 and "5 captions, 1 of them new" in ran.out
    assert count_calls()["UMT5EncoderModel"] == calls + 1
    texts = members(shards, "short", "text.safetensors")
    assert wanprep(*command, "--name", "own", "--same-captions").code == 0
    assert members(shards, "short", "text.safetensors") == texts
    own = members(shards, None, "text.safetensors")
    assert members(shards, "own", "text.safetensors") == own != texts
    assert count_calls()["WanEncoder3d"] == vae


def test_what_fits_nothing_is_said(
    data: Path, shards: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    listed = captions_list(tmp_path / "new.jsonl", {"0.png": "a", "gone.png": "b"})
    command = (
        *("recaption", "--shards", shards, "--model", tiny_t2v, "--name", "some"),
        *("--train-data-dir", data, "--device", "cpu"),
    )
    ran = wanprep(*command, "--train-data-meta", listed)
    assert ran.code == 0, ran.err
    assert "4 samples of 5 without a caption of that name keep their own: 1.png, 2.png" in ran.err
    assert "1 file with captions that fit no sample in the shards: gone.png" in ran.err
    own, some = (members(shards, name, "text.safetensors") for name in (None, "some"))
    assert {source for source in own if own[source] != some[source]} == {"0.png"}

    # What the list gives no more stays, is counted, and goes with --prune.
    captions_list(listed, {"1.png": "c"})
    ran = wanprep(*command, "--train-data-meta", listed)
    assert "leftover 1 that the dataset does not give any more: they stay" in ran.err
    assert len(open_cache(Store(shards / "captions" / "some"))) == 2
    ran = wanprep(*command, "--train-data-meta", listed, "--prune")
    assert "1 caption removed that the list does not give any more" in ran.out
    some = members(shards, "some", "text.safetensors")
    assert {source for source in own if own[source] != some[source]} == {"1.png"}

    captions_list(listed, {"gone.png": "b"})
    ran = wanprep(*command, "--train-data-meta", listed)
    assert ran.code == 1 and "no file of" in ran.err and "such as '0.png'" in ran.err
    for name in ("../x", ".x", "a/b", ""):
        ran = wanprep("recaption", "--shards", shards, "--name", name, "--model", tiny_t2v)
        assert ran.code == 1 and "invalid caption-set name" in ran.err, name
    ran = wanprep("recaption", "--shards", tmp_path / "none", "--name", "x", "--model", tiny_t2v)
    assert ran.code == 1 and "no shards in" in ran.err
    assert not (tmp_path / "none").exists()


def test_several_captions_of_a_clip_get_the_new_ones_in_turn(
    data: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    media, shards = tmp_path / "media", tmp_path / "shards"
    media.mkdir()
    shutil.copy(data / "0.png", media)

    def write(*captions: str) -> None:
        entries = [{"file_path": "0.png", "text": text} for text in captions]
        (media / "metadata.json").write_text(json.dumps(entries))

    def captions() -> list[str]:
        overlay = Cache.open(shards / "captions" / "x")
        return [overlay.info(row)["caption"] for row in range(len(overlay.index))]

    write("a", "b", "c")
    assert encode(tiny_t2v, media, shards).code == 0
    command = (
        *("recaption", "--shards", shards, "--model", tiny_t2v, "--name", "x"),
        *("--train-data-dir", media, "--device", "cpu"),
    )
    for new, expected in (
        (("A", "B", "C"), ["A", "B", "C"]),
        (("D", "E"), ["D", "E", "D"]),
        (("F",), ["F", "F", "F"]),
        (("G", "H", "I", "J"), ["G", "H", "I"]),
    ):
        write(*new)
        ran = wanprep(*command)
        assert ran.code == 0, ran.err
        assert captions() == expected
    assert "1 file with captions that fit no sample in the shards: 0.png" in ran.err


def test_the_cache_decides_what_lives_and_compact_takes_the_rest(
    data: Path, shards: Path, tiny_t2v: Path, tiny_i2v: Path
) -> None:
    recaption = (
        *("recaption", "--shards", shards, "--model", tiny_t2v, "--name", "own"),
        *("--same-captions", "--device", "cpu"),
    )
    assert wanprep(*recaption).code == 0
    add = ("add-condition", "--shards", shards, "--model", tiny_i2v, "--train-data-dir", data)
    assert wanprep(*add, "--device", "cpu").code == 0
    overlays = [shards / "captions" / "own", shards / "conditions"]
    before = members(shards, "own", "text.safetensors")

    assert wanprep("remove", "--shards", shards, "--sample", "*.png").code == 0
    assert set(members(shards, "own", "text.safetensors")) == {"wide.mp4", "tall.mp4"}
    assert [len(open_cache(Store(folder))) for folder in overlays] == [5, 5]

    # From tars alone, everything is the same.
    for folder in (shards, *overlays):
        shutil.rmtree(folder / "index.zarr")
        (folder / "manifest.json").unlink()
    ran = wanprep("index", "--shards", shards)
    assert ran.code == 0, ran.err
    assert all(f"{folder}: " in ran.out for folder in (shards, *overlays))
    assert set(members(shards, "own", "text.safetensors")) == {"wide.mp4", "tall.mp4"}

    ran = wanprep("compact", "--shards", shards)
    assert ran.code == 0, ran.err
    assert "9 dead samples dropped" in ran.out
    assert [len(open_cache(Store(folder))) for folder in overlays] == [2, 2]
    kept = members(shards, "own", "text.safetensors")
    assert kept == {name: before[name] for name in ("wide.mp4", "tall.mp4")}

    # Back in the dataset, they need captions and conditions again.
    assert encode(tiny_t2v, data, shards).code == 0
    ran = wanprep(*recaption)
    assert "5 captions, 3 of them new" in ran.out
    assert members(shards, "own", "text.safetensors") == before


def test_conditions_equal_those_of_an_i2v_encode(
    data: Path, shards: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path, count_calls: Calls
) -> None:
    before = files(shards)
    with pytest.raises(ValueError, match="wanprep add-condition --shards"):
        with_conditions(open_cache(Store(shards)), "MODEL")
    add = ("add-condition", "--shards", shards, "--model", tiny_i2v, "--device", "cpu")
    ran = wanprep(*add, "--train-data-dir", data)
    assert ran.code == 0, ran.err
    assert f"{shards}/conditions: 5 conditions, 5 of them new" in ran.out
    assert count_calls()["UMT5EncoderModel"] == 0
    after = files(shards)
    assert {name: after[name] for name in before} == before

    direct = tmp_path / "direct"
    assert encode(tiny_i2v, data, direct).code == 0
    other = Cache.open(direct)
    index = with_conditions(open_cache(Store(shards)), "MODEL")
    reader = MemberReader(index)
    for row in range(len(index)):
        assert index.key(row) == other.index.key(row)
        for member in ("cond.safetensors", "latents.safetensors", "text.safetensors", "json"):
            assert reader.raw(row, member) == other.raw(row, member)
    reader.close()

    calls = count_calls()["WanEncoder3d"]
    assert "5 conditions, 0 of them new" in wanprep(*add, "--train-data-dir", data).out
    assert count_calls()["WanEncoder3d"] == calls

    # A sample that came later is refused by name until it has its condition.
    more = tmp_path / "more"
    shutil.copytree(data, more)
    Image.fromarray(np.full((64, 64, 3), 9, np.uint8)).save(more / "9.png")
    (more / "9.txt").write_text("nine")
    assert encode(tiny_t2v, more, shards).code == 0
    with pytest.raises(ValueError, match=r"1 of the 6 samples in .* have no condition"):
        with_conditions(open_cache(Store(shards)), "MODEL")
    (more / "9.png").rename(more / "away.png")
    ran = wanprep(*add, "--train-data-dir", more)
    assert ran.code == 1 and "9.png: there is no such file" in ran.err
    Image.fromarray(np.full((64, 64, 3), 8, np.uint8)).save(more / "9.png")
    ran = wanprep(*add, "--train-data-dir", more)
    assert ran.code == 1 and "9.png: its content is not what was encoded" in ran.err
    (more / "away.png").replace(more / "9.png")
    ran = wanprep(*add, "--train-data-dir", more)
    assert ran.code == 0 and "6 conditions, 1 of them new" in ran.out
    assert not (shards / "conditions" / "rejected.jsonl").exists()
    assert len(with_conditions(open_cache(Store(shards)), "MODEL")) == 6


def test_conditions_of_another_vae_or_model_are_refused(
    data: Path, shards: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    add = ("add-condition", "--shards", shards, "--train-data-dir", data, "--device", "cpu")
    ran = wanprep(*add, "--model", tiny_t2v)
    assert ran.code == 1 and "is a t2v model" in ran.err
    other = tiny_model(tmp_path / "other", "i2v", seed=5)
    ran = wanprep(*add, "--model", other)
    assert ran.code == 1 and "latents.vae: shards have" in ran.err
    assert "was encoded by another VAE than" in ran.err
    assert not list((shards / "conditions").glob("*.tar"))
    i2v = tmp_path / "i2v"
    assert encode(tiny_i2v, data, i2v).code == 0
    ran = wanprep(
        *("add-condition", "--shards", i2v, "--train-data-dir", data, "--model", tiny_i2v),
    )
    assert ran.code == 1 and "was encoded for i2v; only a t2v or flf2v" in ran.err
    ran = encode(tiny_i2v, data, shards)
    assert ran.code == 1
    assert "mode: shards have 't2v', expected 'i2v'" in ran.err
    assert "To be redone for the expected values: conditions only" in ran.err
    (line,) = (line for line in ran.err.splitlines() if line.startswith("To add them: wanprep "))
    ran = wanprep(*shlex.split(line)[4:])  # pasted as it stands
    assert ran.code == 0, ran.err


def test_positions_of_keys() -> None:
    """Against a dictionary, with bytes that numpy's strings treat specially."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 2, (300, 16), dtype=np.uint8) * 255
    keys[:50, 8:] = 0
    unique = np.unique(keys, axis=0)
    there = unique[::2]
    numbers = {bytes(key): number for number, key in enumerate(there)}
    expected = [numbers.get(bytes(key), -1) for key in unique]
    assert positions(unique, there).tolist() == expected
    assert (positions(unique, there[:0]) == -1).all()


def test_damaged_captions_are_named_and_encoded_again(
    shards: Path, tiny_t2v: Path, count_calls: Calls
) -> None:
    command = (
        *("recaption", "--shards", shards, "--model", tiny_t2v, "--name", "own"),
        *("--same-captions", "--device", "cpu"),
    )
    assert wanprep(*command).code == 0
    whole = Cache.open(shards / "captions" / "own").contents()
    victim = next(p for p in sorted((shards / "captions" / "own").glob("h*f1-*.tar")))
    victim.write_bytes(victim.read_bytes()[:3000])
    ran = wanprep("index", "--shards", shards)
    assert ran.code == 1 and f"{victim} is damaged" in ran.err
    (shards / "captions" / "own" / "manifest.json").unlink()
    ran = wanprep(*command)
    assert ran.code == 1 and f"{victim} is damaged" in ran.err
    assert "and run `wanprep recaption` again: it encodes only what is missing" in ran.err
    victim.unlink()
    victim.with_suffix(".json").unlink()
    before = count_calls()["UMT5EncoderModel"]
    assert "3 of them new" in wanprep(*command).out
    assert count_calls()["UMT5EncoderModel"] == before + 3
    assert Cache.open(shards / "captions" / "own").contents() == whole


def test_ranks_share_the_captions_and_the_conditions(
    data: Path, shards: Path, tiny_t2v: Path, tiny_i2v: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By key, one after the other here; what is there in the end is what one process makes."""
    commands = [
        ("recaption", "--name", "own", "--same-captions", "--model", tiny_t2v),
        ("add-condition", "--train-data-dir", data, "--model", tiny_i2v),
    ]
    alone = Path(shutil.copytree(shards, shards.with_name("alone")))
    for command in commands:
        assert wanprep(*command, "--shards", alone, "--device", "cpu").code == 0
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        for command in commands:
            ran = wanprep(*command, "--shards", shards, "--device", "cpu")
            assert ran.code == 0, ran.err
    for folder in ("captions/own", "conditions"):
        together, one = Cache.open(shards / folder), Cache.open(alone / folder)
        assert together.contents() == one.contents()
        assert {name.split("-")[-2] for name in together.index.shards} == {"w000", "w001"}
        assert len(together.index.prompt_shards) == len(one.index.prompt_shards)
    ran = encode(tiny_t2v, data, shards)  # a rank reads the prompts that are there
    assert ran.code == 0 and "0 to encode" in ran.err, ran.err


def test_a_cache_of_several_datasets(
    data: Path,
    tiny_t2v: Path,
    tiny_i2v: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files of the same name in two folders of a TOML file are two files here too."""
    monkeypatch.chdir(tmp_path)
    for folder, number in (("one", 0), ("two", 1)):
        Path(folder).mkdir()
        shutil.copy(data / f"{number}.png", Path(folder, "same.png"))
        Path(folder, "same.txt").write_text(f"in {folder}")
    tables = [f'[[datasets]]\nimage_directory = "{folder}"\n' for folder in ("one", "two")]
    Path("data.toml").write_text("\n".join(tables))
    ran = wanprep(
        *("encode", "--model", tiny_t2v, "--dataset-config", "data.toml", "--output", "shards"),
        *SETTINGS,
    )
    assert ran.code == 0, ran.err
    Path("two", "same.txt").write_text("in two, edited")
    common = ("--shards", "shards", "--device", "cpu")
    recaption = ("recaption", "--name", "new", "--model", tiny_t2v, *common)
    ran = wanprep(*recaption, "--dataset-config", "data.toml")
    assert ran.code == 0 and "2 captions, 2 of them new" in ran.out, ran.err
    own, new = (members(Path("shards"), name, "text.safetensors") for name in (None, "new"))
    assert {source for source in own if own[source] != new[source]} == {"two/same.png"}
    ran = wanprep("add-condition", "--model", tiny_i2v, "--train-data-dir", ".", *common)
    assert ran.code == 0 and "2 conditions, 2 of them new" in ran.out, ran.err
