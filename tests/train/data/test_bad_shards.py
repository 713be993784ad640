"""Damaged caches, through the command line: one message with file and cure, never a traceback."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocess.cache.remove import remove
from shared.format.cache import COLUMNS, CacheIndex, open_cache
from shared.format.schema import LATENTS_MEMBER, MEMBERS, TEXT_MEMBER
from shared.io.store import Store
from tests.train.test_distill import WANTRAIN, arguments
from train.cli.app import main


@pytest.fixture
def shards(t2v_shards: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    copy = tmp_path / "shards"
    shutil.copytree(t2v_shards, copy)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


Refusal = Callable[..., str]


@pytest.fixture
def refusal(
    tiny_t2v: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refusal:  # fmt: skip
    """Runs `wantrain distill` over the copy as a user would; what it says after "error:"."""

    def run(*more: str) -> str:
        command = arguments(
            tiny_t2v, shards, tmp_path / "out", "--max-train-steps", "3", "--train-batch-size",
            "1", "--caption-dropout", "0", *more,
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["wantrain", *command])
        with pytest.raises(SystemExit) as ended:  # any other exception is the traceback
            main()
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said and "\nerror: " in "\n" + said, said
        return said[("\n" + said).index("\nerror: ") :]

    return run


def test_a_whole_copy_trains(
    tiny_t2v: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the tests below refuse is the damage alone."""
    command = arguments(tiny_t2v, shards, tmp_path / "out", "--max-train-steps", "3")
    monkeypatch.setattr(sys, "argv", ["wantrain", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_a_cache_whose_samples_are_all_removed(shards: Path, refusal: Refusal) -> None:
    remove(Store(shards), ["*"], dry_run=False)
    said = refusal()
    assert f"{shards} has no samples" in said and f"wanprep encode --output {shards}" in said


def test_a_prompt_tar_that_is_gone(shards: Path, refusal: Refusal) -> None:
    (name,) = open_cache(Store(shards)).prompt_shards
    (shards / name).unlink()
    said = refusal()
    assert f"1 shard(s) that are gone, the first {name}" in said and "wanprep index" in said


@pytest.mark.parametrize("keep", [0, 100, 700, 1500])
def test_a_truncated_prompt_tar(shards: Path, refusal: Refusal, keep: int) -> None:
    (name,) = open_cache(Store(shards)).prompt_shards
    (shards / name).write_bytes((shards / name).read_bytes()[:keep])
    said = refusal()
    assert name in said or "no empty and no negative prompt" in said
    assert "wanprep encode" in said


def _chunks(shards: Path, column: str) -> list[Path]:
    return [path for path in (shards / "index.zarr" / column / "c").rglob("*") if path.is_file()]


READ = sorted(set(COLUMNS) - {"caption", "tokens", "states"})  # the columns that training reads


@pytest.mark.parametrize("column", READ)
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_garbage_index_chunk(shards: Path, refusal: Refusal, column: str, damage: str) -> None:
    (chunk,) = _chunks(shards, column)
    whole = chunk.read_bytes()
    chunk.write_bytes(
        {"garbage": b"\xa5" * len(whole), "truncated": whole[: len(whole) // 2], "empty": b""}[
            damage
        ]
    )
    said = refusal()
    assert f"column '{column}'" in said and f"wanprep index --shards {shards}" in said


@pytest.mark.parametrize("column", READ)
def test_a_lost_index_chunk(shards: Path, refusal: Refusal, column: str) -> None:
    """zarr reads a missing chunk as zeros: another bucket, another type, in silence."""
    (chunk,) = _chunks(shards, column)
    chunk.unlink()
    said = refusal()
    assert f"wanprep index --shards {shards}" in said


@pytest.mark.parametrize(
    "field", ["format", "fingerprint", "index", "buckets", "shards", "prompts"]
)
def test_a_manifest_without_a_field(shards: Path, refusal: Refusal, field: str) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest[field]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    said = refusal()
    assert "manifest.json" in said and ("wanprep index" in said or "Encode again" in said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "text"),
        ("fingerprint", {}),
        ("buckets", [{"height": 64}]),
        ("buckets", 3),
        ("buckets", []),
        ("shards", [{}]),
        ("shards", ["h.tar"]),
        ("shards", []),
        ("prompts", None),
        ("prompts", []),
    ],
    ids=str,
)
def test_a_manifest_with_a_misspelt_field(
    shards: Path, refusal: Refusal, field: str, value: object
) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    assert "wanprep" in refusal()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_manifest_that_is_no_json_object(shards: Path, refusal: Refusal, text: str) -> None:
    (shards / "manifest.json").write_text(text)
    assert "manifest.json" in refusal()


def _overwrite(index: CacheIndex, member: str, change: Callable[[bytes], bytes]) -> set[str]:
    """Change a member's bytes of every sample where they lie; the shards' names."""
    column = MEMBERS.index(member)
    for row in range(len(index)):
        path = index.folder / index.shards[int(index.shard_ids[row])]
        begin, length = int(index.offsets[row, column]), int(index.lengths[row, column])
        data = path.read_bytes()
        changed = change(data[begin : begin + length])
        assert len(changed) == length and changed != data[begin : begin + length]
        path.write_bytes(data[:begin] + changed + data[begin + length :])
    return set(index.shards)


def _renamed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


def _shorter_shape(data: bytes) -> bytes:
    """The first two numbers of the shape swapped: the same number of bytes, another shape."""
    begin = data.index(b'"shape":[') + len(b'"shape":[')
    end = data.index(b"]", begin)
    first, second, *rest = data[begin:end].split(b",")
    return data[:begin] + b",".join([second, first, *rest]) + data[end:]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        (LATENTS_MEMBER, _renamed(b'"latents"', b'"latentz"'), "holds ['latentz'], expected"),
        (TEXT_MEMBER, _renamed(b'"text"', b'"tent"'), "holds ['tent'], expected 'text'"),
        (LATENTS_MEMBER, _shorter_shape, "has shape ("),
        (TEXT_MEMBER, _shorter_shape, "has shape (32, "),
        (LATENTS_MEMBER, lambda data: b"\xff" * len(data), "is damaged"),
        (TEXT_MEMBER, lambda data: bytes(len(data)), "is damaged"),
        (LATENTS_MEMBER, _renamed(b'"dtype":"', b'"dtype":?'), "is damaged"),
    ],
    ids=["latents' name", "text's name", "latents' shape", "text's shape", "ones", "zeros", "json"],
)
def test_a_member_of_another_kind(
    shards: Path, refusal: Refusal, workers: str, member: str, change: Callable[[bytes], bytes],
    message: str,
) -> None:  # fmt: skip
    names = _overwrite(open_cache(Store(shards)), member, change)
    said = refusal("--dataloader-num-workers", workers)
    assert message in said and member in said and "wanprep encode" in said
    assert any(f"{name}: sample " in said for name in names)


def test_a_shard_that_is_gone_or_cut(shards: Path, refusal: Refusal) -> None:
    for name in open_cache(Store(shards)).shards:
        (shards / name).write_bytes((shards / name).read_bytes()[:600])
    assert ".tar: sample " in refusal()
    name = open_cache(Store(shards)).shards[0]
    (shards / name).unlink()
    assert f"1 shard(s) that are gone, the first {name}" in refusal()


def test_a_shard_that_goes_while_a_run_reads_it(
    tiny_t2v: Path, shards: Path, tmp_path: Path
) -> None:
    """As a process with workers: it ends by itself, within a minute, with the message."""
    for path in shards.glob("*.tar"):
        if path.name in open_cache(Store(shards)).shards:
            path.unlink()
            path.symlink_to(shards)  # it exists when the cache is opened, and can't be read
    ended = subprocess.run(
        [
            WANTRAIN, *arguments(tiny_t2v, shards, tmp_path / "out", "--max-train-steps", "9"),
            "--dataloader-num-workers", "2",
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "error: shards: " in ended.stderr and "Traceback" not in ended.stderr
