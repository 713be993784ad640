"""`wanprep verify` names every kind of damage by shard and key, and finds none where there is none.

Real caches, damaged at places that a seed draws. What changes a tar is tried twice: with the
checksum of its sidecar left as it was, and signed again, so that only the content can tell.
"""

import hashlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from safetensors.torch import load, save

from preprocess.verify.findings import CODES
from shared.cache.writer import writer_lock
from shared.format.cache import Sidecar, column_digest
from tests.models import tiny_model
from tests.preprocess.conftest import Cache, render_clip, wanprep, wanprep_process, write_metadata

Members = list[tuple[str, bytes]]
SEEDS = (0, 1)


@dataclass(frozen=True)
class World:
    data: Path
    model: Path
    shards: Path

    def encode(self, shards: Path) -> list[object]:
        return [
            *("encode", "--model", self.model, "--train-data-dir", self.data, "--size", 64),
            *("--video-sample-n-frames", 9, "--output", shards, "--device", "cpu"),
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> World:
    """An i2v cache of two clips, two images and an edited caption, with captions beside it."""
    folder = tmp_path_factory.mktemp("verify")
    data = folder / "data"
    data.mkdir()
    for number in range(2):
        render_clip(data / f"clip{number}.mp4", height=64, width=96, frames=20, seed=number)
    for name in ("0-0.png", "1-1.png"):
        shutil.copy(pictures / name, data)
    world = World(data, tiny_model(folder / "model", "i2v"), folder / "shards")
    names = ("clip0.mp4", "clip1.mp4", "0-0.png", "1-1.png")
    entries = [{"file_path": name, "text": f"this is {name}"} for name in names]
    write_metadata(data, entries)
    assert wanprep(*world.encode(world.shards)).code == 0
    entries[2]["text"] = "edited"
    write_metadata(data, entries)
    assert wanprep(*world.encode(world.shards)).code == 0
    assert recaption(world, world.shards).code == 0
    return world


def recaption(world: World, shards: Path) -> Any:
    return wanprep(
        *("recaption", "--name", "again", "--same-captions", "--model", world.model),
        *("--shards", shards, "--device", "cpu"),
    )


@pytest.fixture
def shards(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.shards, tmp_path / "shards"))


def verify(shards: Path, *more: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, findings, and what stands on the terminal."""
    found = shards.parent / "found.json"
    found.unlink(missing_ok=True)
    ran = wanprep("verify", "--shards", shards, "--json", found, *more)
    assert found.exists(), ran
    return ran.code, json.loads(found.read_text())["findings"], ran.out + ran.err


def codes(findings: list[dict[str, Any]], severity: str = "error") -> set[str]:
    return {finding["code"] for finding in findings if finding["severity"] == severity}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# Damage to a tar: edit its members, write it again.


def read_tar(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def sign(tar: Path, *, count: int | None = None) -> None:
    """Make the sidecar agree with the tar again."""
    path = Sidecar.path_for(tar)
    value = json.loads(path.read_text())
    value["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    value["bytes"] = tar.stat().st_size
    value["count"] = value["count"] if count is None else count
    path.write_text(json.dumps(value))


def edit_tensor(data: bytes, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    return save({name: change(tensor).contiguous() for name, tensor in load(data).items()})


def spoil(value: float) -> Callable[[torch.Tensor, random.Random], torch.Tensor]:
    def spoiled(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[draw.randrange(tensor.numel())] = value
        return tensor

    return spoiled


def repeated(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return tensor.repeat(600, 1)[: draw.randint(513, 700)]


# code → (suffix, change of its one tensor)
TENSORS: dict[str, tuple[str, str, Callable[[torch.Tensor, random.Random], torch.Tensor]]] = {
    "NaN latents": ("not-finite", "latents", spoil(float("nan"))),
    "infinite condition": ("not-finite", "cond", spoil(float("-inf"))),
    "NaN text": ("not-finite", "text", spoil(float("nan"))),
    "zero text": ("text-zero", "text", lambda t, _: torch.zeros_like(t)),
    "long text": ("text-shape", "text", repeated),
    "wide text": ("text-shape", "text", lambda t, _: torch.cat([t, t], dim=1)),
    "no text": ("tensor-damaged", "text", lambda t, _: t[:0]),
    "zero latents": ("latents-constant", "latents", lambda t, _: torch.zeros_like(t)),
    "flat condition": ("cond-constant", "cond", lambda t, _: torch.full_like(t, 0.25)),
    "channels lost": ("latents-shape", "latents", lambda t, _: t[:-1]),
    "latents transposed": ("latents-shape", "latents", lambda t, _: t.permute(1, 0, 2, 3)),
    "condition cut": ("cond-shape", "cond", lambda t, _: t[:, :, :-1]),
    "fp32 latents": ("dtype", "latents", lambda t, _: t.float()),
    "fp32 text": ("dtype", "text", lambda t, _: t.float()),
    "fp16 latents": ("tensor-damaged", "latents", lambda t, _: t.half()),
}


def changed(kind: str, members: Members, draw: random.Random) -> tuple[Members, str, str]:
    """Members with one damage at a drawn place; key and suffix of it."""
    if kind in TENSORS:
        _, name, change = TENSORS[kind]
        places = [n for n, (full, _) in enumerate(members) if full.endswith(f".{name}.safetensors")]
        place = draw.choice(places)
        full, data = members[place]
        members[place] = full, edit_tensor(data, lambda tensor: change(tensor, draw))
    else:
        place = draw.randrange(len(members))
        if "JSON" in kind or kind == "no object":
            place -= place % 4
        elif kind == "safetensors header" or kind == "tensor renamed":
            place = 4 * (place // 4) + draw.randint(1, 3)
        full, data = members[place]
        if kind == "member lost":
            del members[place]
        elif kind == "member twice":
            members.insert(place + 1, (full, data))
        elif kind == "member late":
            place = 4 * (place // 4) + draw.randint(0, 2)
            full, data = members[place]
            members[place : place + 2] = members[place + 1], (full, data)
        elif kind == "stranger":
            members.insert(place + 1, (full.split(".")[0] + ".jpg", b"JFIF"))
        elif kind == "no JSON":
            members[place] = full, data[: draw.randrange(1, len(data))]
        elif kind == "no object":
            members[place] = full, b"[1]"
        elif kind == "JSON of another bucket":
            info = json.loads(data)
            info[draw.choice(["width", "height", "frames"])] += 16
            members[place] = full, json.dumps(info).encode()
        elif kind == "JSON without caption":
            info = json.loads(data)
            del info["caption"]
            members[place] = full, json.dumps(info).encode()
        elif kind in WRONG_NUMBERS:
            info = json.loads(data) | {WRONG_NUMBERS[kind]: 0}
            members[place] = full, json.dumps(info).encode()
        elif kind == "safetensors header":
            members[place] = full, struct.pack("<Q", 1 << 40) + data[8:]
        elif kind == "tensor renamed":
            members[place] = full, save({"x": next(iter(load(data).values()))})
        else:
            raise AssertionError(kind)
    key, _, suffix = full.partition(".")
    return members, key, suffix


WRONG_NUMBERS = {"JSON of no repeats": "repeats", "JSON of no frame rule": "frame_rule"}
"""Of what the index refuses, too."""
EDITS = {
    **{kind: code for kind, (code, _, _) in TENSORS.items()},
    "member lost": "member-missing",
    "member twice": "member-duplicate",
    "member late": "member-order",
    "stranger": "member-unexpected",
    "no JSON": "json-damaged",
    "no object": "json-damaged",
    "JSON of another bucket": "json-bucket",
    "JSON without caption": "json-field",
    **dict.fromkeys(WRONG_NUMBERS, "json-field"),
    "safetensors header": "tensor-damaged",
    "tensor renamed": "tensor-name",
}


def sample_tars(shards: Path) -> list[Path]:
    """Those whose samples all live: of the replaced caption's two shards the newer."""
    index = Cache.open(shards).index
    alive = {index.shards[int(shard)] for shard in index.shard_ids}
    return [
        shards / name
        for name in sorted(alive)
        if sum(index.shards[int(s)] == name for s in index.shard_ids)
        == Sidecar.read(Sidecar.path_for(shards / name)).count
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", EDITS)
def test_damage_inside_a_tar(kind: str, seed: int, shards: Path) -> None:
    draw = random.Random(f"{kind} {seed}")
    tar = draw.choice(sample_tars(shards))
    members, key, suffix = changed(kind, read_tar(tar), draw)
    write_tar(tar, members)
    for signed in (False, True):
        if signed:
            sign(tar)
        code, findings, said = verify(shards)
        assert code == 1
        named = {
            (f["file"], f["key"], f["code"], f["member"]) for f in findings if f["key"] is not None
        }
        # A stranger is not one of the sample's members, so its name stands in the text.
        wanted = (tar.name, key, EDITS[kind], None if kind == "stranger" else suffix)
        assert named == {wanted}
        assert f"{tar.name}: {key}" in said and EDITS[kind] in said
        whole = codes([f for f in findings if f["key"] is None])
        # Signed again, the shard is another than the one that the index was made of.
        assert whole - {"size"} == ({"index-stale"} if signed else {"checksum"})
        assert all(f["cure"] and f["found"] and f["expected"] for f in findings)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_condition_of_another_clip(seed: int, shards: Path) -> None:
    draw = random.Random(seed)
    (tar,) = (tar for tar in sample_tars(shards) if "-f9-" in tar.name)
    members = read_tar(tar)
    place = draw.choice([3, 7])
    members[place] = members[place][0], members[(place + 4) % 8][1]
    write_tar(tar, members)
    sign(tar)
    _, findings, _ = verify(shards)
    (foreign,) = (f for f in findings if f["key"])
    key = members[place][0].split(".")[0]
    assert (foreign["code"], foreign["file"], foreign["key"]) == ("cond-foreign", tar.name, key)


def test_a_place_where_nothing_can_be_written(world: World, tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "found"
    nowhere.parent.write_text("a file, where a folder should be")
    for command, option in (("verify", "--json"), ("inspect", "--html")):
        for place, said in ((tmp_path, "is a folder"), (nowhere, "cannot write")):
            ran = wanprep(command, "--shards", world.shards, option, place)
            assert ran.code == 1, (ran.out, ran.err)
            assert f"error: {option}: " in ran.err and said in ran.err and str(place) in ran.err
    ran = wanprep("verify", "--shards", world.shards, "--decode", 1, "--output", nowhere.parent)
    assert ran.code == 1 and f"error: --output: {nowhere.parent} is a file" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["no"]


def test_videos_of_one_frame_are_sound(world: World, tmp_path: Path) -> None:
    """Their condition is the encoding of zeros, as an image's."""
    shards = tmp_path / "one"
    assert wanprep(*world.encode(shards), "--video-sample-n-frames", 1).code == 0
    assert verify(shards)[:2] == (0, [])


def test_a_sample_that_is_there_twice(shards: Path) -> None:
    (tar,) = (tar for tar in sample_tars(shards) if "-f9-" in tar.name)
    members = read_tar(tar)
    key = members[0][0].split(".")[0]
    write_tar(tar, members + members[:4])
    sign(tar)
    _, findings, _ = verify(shards)
    assert [(f["code"], f["file"]) for f in findings if f["key"] == key] == [
        ("key-duplicate", tar.name)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_tar_that_is_cut(seed: int, shards: Path) -> None:
    """Whatever of it is gone, the first sample that suffers is named."""
    draw = random.Random(seed)
    tar = draw.choice(sample_tars(shards))
    row = Cache.open(shards).index
    places = [
        (int(row.offsets[n].max() + row.lengths[n].max()), row.key(n))
        for n in range(len(row))
        if row.shards[int(row.shard_ids[n])] == tar.name
    ]
    kept = draw.randrange(1, max(places)[0])
    os.truncate(tar, kept)
    for signed in (False, True):
        if signed:
            sign(tar)
        code, findings, _ = verify(shards)
        assert code == 1
        (cut,) = (f for f in findings if f["code"] == "tar-truncated")
        assert cut["file"] == tar.name
        assert cut["key"] == min(place for place in places if place[0] > kept)[1]
        others = codes(findings) - {"tar-truncated", "member-missing"}
        assert others == ({"index-stale"} if signed else {"size", "checksum"})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_header_is_not_taken_for_the_end(seed: int, shards: Path) -> None:
    draw = random.Random(seed)
    (tar,) = (tar for tar in sample_tars(shards) if "-f9-" in tar.name)
    with tarfile.open(tar) as opened:
        hurt = draw.choice(opened.getmembers())
    with tar.open("r+b") as stream:
        stream.seek(hurt.offset + 150)  # inside the header's checksum
        stream.write(b"zz")
    sign(tar)
    _, findings, _ = verify(shards)
    (damage,) = (f for f in findings if f["code"] == "tar-damaged")
    assert damage["file"] == tar.name and damage["key"] == hurt.name.split(".")[0]


# Damage to what lies beside the tars.


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(1, len(data) - 2)])


def lost_sidecar(shards: Path, draw: random.Random) -> str:
    tar = draw.choice(sample_tars(shards))
    Sidecar.path_for(tar).unlink()
    return tar.name


def torn_sidecar(shards: Path, draw: random.Random) -> str:
    path = Sidecar.path_for(draw.choice(sample_tars(shards)))
    cut(path, draw)
    return path.name


def wrong_count(shards: Path, draw: random.Random) -> str:
    tar = draw.choice(sample_tars(shards))
    sign(tar, count=draw.randint(5, 50))
    return tar.name


def lost_tar(shards: Path, draw: random.Random) -> str:
    tar = draw.choice(sample_tars(shards))
    tar.unlink()
    return tar.name


def flipped_bit(shards: Path, draw: random.Random) -> str:
    tar = draw.choice(sample_tars(shards))
    with tarfile.open(tar) as opened:
        text = draw.choice([m for m in opened if m.name.endswith(".text.safetensors")])
    data = bytearray(tar.read_bytes())
    data[text.offset_data + text.size - 2 * draw.randint(1, 8)] ^= 1  # lowest bit of a mantissa
    tar.write_bytes(data)
    return tar.name


def torn_tombstones(shards: Path, draw: random.Random) -> str:
    key = Cache.open(shards).index.key(0)
    assert wanprep("remove", "--sample", key, "--shards", shards).code == 0
    (path,) = shards.glob("tombstones-*.json")
    cut(path, draw)
    return path.name


def no_negative_prompt(shards: Path, draw: random.Random) -> str:
    for tar in shards.glob("prompts-*.tar"):
        role = draw.choice(["empty", "negative"])
        members = read_tar(tar)
        kept = [
            member
            for first in range(0, len(members), 2)
            for member in members[first : first + 2]
            if json.loads(members[first][1])["role"] != role
        ]
        write_tar(tar, kept)
        sign(tar, count=len(kept) // 2)
    assert wanprep("index", "--shards", shards).code == 0
    return "prompts-*.tar"


def torn_manifest(shards: Path, draw: random.Random) -> str:
    cut(shards / "manifest.json", draw)
    return "manifest.json"


def lying_manifest(shards: Path, draw: random.Random) -> str:
    path = shards / "manifest.json"
    value = json.loads(path.read_text())
    draw.choice(value["shards"])["count"] += 1
    path.write_text(json.dumps(value))
    return path.name


def lost_chunk(shards: Path, draw: random.Random) -> str:
    chunks = sorted(path for path in (shards / "index.zarr").rglob("c/*") if path.is_file())
    draw.choice(chunks).unlink()
    return "index.zarr"


def stale_index(shards: Path, draw: random.Random) -> str:
    tar = draw.choice(sample_tars(shards))
    tar.unlink()
    Sidecar.path_for(tar).unlink()
    path = shards / "manifest.json"
    value = json.loads(path.read_text())
    value["shards"] = [entry for entry in value["shards"] if entry["name"] != tar.name]
    path.write_text(json.dumps(value))
    return "index.zarr"


def mixed_settings(shards: Path, draw: random.Random) -> str:
    tar = draw.choice(sample_tars(shards))
    path = Sidecar.path_for(tar)
    value = json.loads(path.read_text())
    value["fingerprint"]["media"]["seed"] = 43
    path.write_text(json.dumps(value))
    return tar.name


BESIDE: dict[str, tuple[Callable[[Path, random.Random], str], set[str]]] = {
    "sidecar lost": (lost_sidecar, {"sidecar-missing"}),
    "sidecar torn": (torn_sidecar, {"sidecar-damaged"}),
    "sidecar counts wrong": (wrong_count, {"count", "manifest-damaged"}),
    "tar lost": (lost_tar, {"tar-missing"}),
    "bit flipped": (flipped_bit, {"checksum"}),
    "tombstones torn": (torn_tombstones, {"tombstones-damaged"}),
    "prompt lost": (no_negative_prompt, {"prompt-missing"}),
    "manifest torn": (torn_manifest, {"manifest-damaged"}),
    "manifest lies": (lying_manifest, {"manifest-damaged"}),
    "index chunk lost": (lost_chunk, {"index-damaged"}),
    "index of other shards": (stale_index, {"index-damaged"}),
    "settings mixed": (mixed_settings, {"fingerprint-mixed"}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", BESIDE)
def test_damage_beside_the_tars(kind: str, seed: int, shards: Path) -> None:
    damage, expected = BESIDE[kind]
    file = damage(shards, random.Random(f"{kind} {seed}"))
    code, findings, said = verify(shards)
    assert code == 1
    assert codes(findings) == expected
    assert file in {f["file"] for f in findings if f["severity"] == "error"}
    assert file in said


@pytest.mark.parametrize("column", ["offset", "length", "tokens", "caption", "type", "repeats"])
def test_a_row_that_is_not_what_the_tar_holds(column: str, shards: Path) -> None:
    """Even where the index is whole in itself: its own digests agree."""
    index = Cache.open(shards).index
    row = random.Random(column).randrange(len(index))
    group = zarr.open_group(shards / "index.zarr", mode="r+")
    values = group[column][:]  # type: ignore[index]
    values[row] = values[row] + 1
    group[column][:] = values  # type: ignore[index]
    group.attrs["sha256"] = {**group.attrs["sha256"], column: column_digest(values)}  # type: ignore[dict-item]
    code, findings, _ = verify(shards)
    assert code == 1
    (finding,) = findings
    assert (finding["code"], finding["key"]) == ("index-row", index.key(row))
    assert index.shards[int(index.shard_ids[row])] in finding["found"]
    assert wanprep("index", "--shards", shards).code == 0
    assert verify(shards)[:2] == (0, [])


def test_a_sound_cache_is_clean_and_stays_as_it_is(shards: Path) -> None:
    before = snapshot(shards)
    code, findings, said = verify(shards)
    assert (code, findings) == (0, [])
    assert (
        "5 samples and 4 captions or conditions in" in said
    )  # one is dead: its caption was edited
    assert "no errors" in said
    assert snapshot(shards) == before


def test_the_captions_beside_it_are_checked_too(shards: Path) -> None:
    (tar,) = (shards / "captions" / "again").glob("h*-f9-*.tar")
    members = read_tar(tar)
    members[3] = members[3][0], edit_tensor(members[3][1], torch.zeros_like)
    write_tar(tar, members)
    sign(tar)
    code, findings, _ = verify(shards)
    (zero,) = (f for f in findings if f["code"] == "text-zero")
    assert code == 1 and zero["key"] == members[3][0].split(".")[0]
    assert zero["file"] == f"captions/again/{tar.name}"
    assert "recaption" in zero["cure"]


def test_conditions_beside_it_are_checked_too(world: World, tmp_path: Path) -> None:
    t2v, shards = tiny_model(tmp_path / "t2v", "t2v"), tmp_path / "shards"
    base = World(world.data, t2v, shards)
    assert wanprep(*base.encode(shards)).code == 0
    add = ("add-condition", "--shards", shards, "--model", world.model, "--device", "cpu")
    assert wanprep(*add, "--train-data-dir", world.data).code == 0
    assert verify(shards)[:2] == (0, [])
    tar = sorted((shards / "conditions").glob("h*.tar"))[0]
    members = read_tar(tar)
    members[1] = members[1][0], edit_tensor(members[1][1], lambda cond: cond * float("nan"))
    write_tar(tar, members)
    sign(tar)
    code, findings, _ = verify(shards)
    (bad,) = (f for f in findings if f["code"] == "not-finite")
    assert code == 1 and bad["file"] == f"conditions/{tar.name}"
    assert bad["key"] == members[1][0].split(".")[0] and "add-condition" in bad["cure"]


@pytest.mark.parametrize("mode", ["ti2v", "wan21-i2v"])
def test_every_family_is_clean(mode: Any, world: World, tmp_path: Path) -> None:
    other = World(
        world.data, tiny_model(tmp_path / mode, mode, two_experts=False), tmp_path / "shards"
    )
    assert wanprep(*other.encode(other.shards)).code == 0
    code, findings, said = verify(other.shards)
    assert (code, findings) == (0, []), said
    if mode == "ti2v":
        return
    tar = sample_tars(other.shards)[0]
    members = read_tar(tar)
    tensors = load(members[3][1])
    for clip, code in (
        (None, "tensor-name"),
        (torch.zeros_like(tensors["clip"]), "clip-zero"),
        (tensors["clip"][:, 1:], "clip-shape"),
        (tensors["clip"] * float("inf"), "not-finite"),
    ):
        with_it = {} if clip is None else {"clip": clip.contiguous()}
        members[3] = members[3][0], save({"cond": tensors["cond"], **with_it})
        write_tar(tar, members)
        sign(tar)
        _, findings, _ = verify(other.shards)
        (bad,) = (f for f in findings if f["key"])
        assert f"{bad['key']}.{bad['member']}" == members[3][0] and bad["code"] == code


def test_the_cure_of_a_sick_sample_cures_it(world: World, shards: Path) -> None:
    (tar,) = (tar for tar in sample_tars(shards) if "-f9-" in tar.name)
    members, key, _ = changed("NaN latents", read_tar(tar), random.Random(0))
    write_tar(tar, members)
    sign(tar)
    assert wanprep("index", "--shards", shards).code == 0
    code, findings, _ = verify(shards)
    assert code == 1
    cures = {finding["cure"] for finding in findings}
    remove = f"wanprep remove --shards {shards} --sample {key}"
    assert cures == {f"{remove}; then run `wanprep encode` again"}
    assert wanprep(*remove.split()[1:]).code == 0
    assert wanprep(*world.encode(shards)).code == 0
    code, findings, _ = verify(shards)
    assert (code, codes(findings), codes(findings, "note")) == (0, set(), {"not-finite"})
    assert wanprep("compact", "--shards", shards).code == 0
    assert verify(shards)[:2] == (0, [])


def test_what_a_running_writer_has_not_committed_is_no_finding(shards: Path) -> None:
    tar = sample_tars(shards)[0]
    unfinished = shards / tar.name.replace("-w000-", "-w001-")
    unfinished.write_bytes(tar.read_bytes()[:1000])
    (shards / f"{unfinished.name}.tmp").write_bytes(b"begun")
    with writer_lock(shards, 1):
        before = snapshot(shards)
        assert verify(shards)[:2] == (0, [])
        assert snapshot(shards) == before
    code, findings, _ = verify(shards)  # its writer is dead now
    assert (code, codes(findings, "note")) == (0, {"sidecar-missing"})


@pytest.mark.long
def test_beside_a_wanprep_that_encodes(world: World, shards: Path, pictures: Path) -> None:
    data = shards.parent / "more"
    shutil.copytree(pictures, data)
    more = World(data, world.model, shards)
    process = wanprep_process(*more.encode(shards), cwd=shards.parent)
    runs = 0
    while process.poll() is None:
        code, findings, _ = verify(shards)
        assert (code, codes(findings)) == (0, set())
        runs += 1
    assert process.returncode == 0 and runs > 1
    assert verify(shards)[:2] == (0, [])


@pytest.mark.parametrize("seed", range(12))
def test_any_byte_of_any_tar(seed: int, shards: Path) -> None:
    draw = random.Random(seed)
    tar = draw.choice(sorted(shards.rglob("*.tar")))
    data = bytearray(tar.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    tar.write_bytes(data)
    code, findings, _ = verify(shards)
    assert code == 1 and "checksum" in codes(findings)
    assert {f["file"] for f in findings} == {str(tar.relative_to(shards))}
    sign(tar)  # now nothing but the content can tell; whatever it is, it is no crash
    verify(shards)


@pytest.mark.parametrize("seed", range(12))
def test_any_byte_beside_the_tars(seed: int, shards: Path) -> None:
    draw = random.Random(seed)
    files = [*shards.rglob("*.json"), *shards.rglob("c/*")]
    path = draw.choice(sorted(file for file in files if file.is_file()))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    assert verify(shards)[0] in (0, 1)  # some bytes are blanks


def test_findings_on_stdout_are_json_alone(shards: Path) -> None:
    flipped_bit(shards, random.Random(0))
    ran = wanprep("verify", "--shards", shards, "--json", "-")
    assert ran.code == 1
    assert json.loads(ran.out)["errors"] == 1


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "caches.md").read_text()
    assert [code for code in CODES if f"`{code}`" not in text] == []
