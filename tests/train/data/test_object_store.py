"""`wantrain distill --shards s3://…`: from a bucket the same LoRA as from a folder."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.format.cache import committed_shards
from shared.io.mirror import open_store
from tests.object_store import BUCKET, ObjectStore, another_machine
from tests.train.test_distill import WANTRAIN, arguments, distill, final_bytes
from train.cli.app import app as wantrain

SHORT = ("--max-train-steps", "2", "--mixed-precision", "no")


@pytest.fixture(scope="module")
def bucket(store: ObjectStore, t2v_shards: Path) -> str:
    """URL of a copy of a folder of shards."""
    return store.upload(t2v_shards, "train")


@pytest.fixture(scope="module")
def from_folder(
    tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The LoRA of two updates on the folder."""
    out = tmp_path_factory.mktemp("folder") / "out"
    return final_bytes(distill(tiny_t2v, t2v_shards, out, *SHORT))


@pytest.fixture
def machine(store: ObjectStore, tmp_path: Path) -> Iterator[Path]:
    """The local cache of a machine that has read nothing of the bucket."""
    with another_machine(tmp_path / "machine", **store.environment):
        yield tmp_path / "machine"


def _fetched(machine: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in (machine / "shards").glob("*.tar")}


@pytest.mark.parametrize("workers", ["0", "3"])
def test_the_same_lora_as_from_a_folder(
    workers: str,
    bucket: str,
    machine: Path,
    tiny_t2v: Path,
    t2v_shards: Path,
    from_folder: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = (*SHORT, "--dataloader-num-workers", workers)
    wantrain(arguments(tiny_t2v, bucket, tmp_path / "out", *more), standalone_mode=False)  # type: ignore[arg-type]
    assert final_bytes(tmp_path / "out") == from_folder
    said = capsys.readouterr().err
    assert f"of {bucket};" in said and "fetched whole into" in said
    whole = {sidecar.sha256: sidecar.bytes for sidecar in committed_shards(t2v_shards)}
    assert _fetched(machine).items() <= whole.items()
    assert len(_fetched(machine)) >= 2  # prompts, and what the updates showed


def test_without_room_for_shards_samples_are_read_one_by_one(
    bucket: str,
    machine: Path,
    tiny_t2v: Path,
    t2v_shards: Path,
    from_folder: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = (*SHORT, "--shard-cache-gb", "0")
    wantrain(arguments(tiny_t2v, bucket, tmp_path / "out", *more), standalone_mode=False)  # type: ignore[arg-type]
    assert final_bytes(tmp_path / "out") == from_folder
    assert "is read sample by sample (--shard-cache-gb)" in capsys.readouterr().err
    prompts = {s.sha256 for s in committed_shards(t2v_shards) if s.kind == "prompts"}
    assert set(_fetched(machine)) <= prompts


def test_a_condition_on_captions_is_answered_without_fetching_shards(
    bucket: str,
    machine: Path,
    tiny_t2v: Path,
    t2v_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--where", "caption~=kind [12]", "--shards", str(t2v_shards), "--dry-run")
    wantrain(arguments(tiny_t2v, bucket, tmp_path / "out", *more), standalone_mode=False)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert f"2 of 6 samples of {bucket}" in said and f"2 of 6 samples of {t2v_shards}" in said
    assert f"2 samples of {t2v_shards} are in a folder before it, too" in said
    assert _fetched(machine) == {}


def test_two_runs_share_what_they_fetch(
    bucket: str, store: ObjectStore, machine: Path, t2v_shards: Path
) -> None:
    """Two processes and eight threads want the same shards at once; all get whole ones."""
    script = (
        "import sys\nfrom shared.format.cache import open_cache\n"
        "from shared.io.mirror import open_store\n"
        "store = open_store(sys.argv[1])\nstore.pull()\n"
        "for name in open_cache(store).shards:\n"
        "    print(store.shard_file(store.folder / name).stat().st_size)\n"
    )
    python = str(Path(WANTRAIN).with_name("python"))
    processes = [
        subprocess.Popen([python, "-c", script, bucket], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shards = open_store(bucket)
    shards.pull()
    samples = [s for s in committed_shards(t2v_shards) if s.kind == "samples"]
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(shards.shard_file, [shards.folder / s.shard for s in samples] * 8))
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert [int(line) for line in out.split()] == [s.bytes for s in samples]
    assert {file.stem for file in files} == {s.sha256 for s in samples}
    assert _fetched(machine) == {s.sha256: s.bytes for s in samples}
    assert not list((machine / "shards").glob("*.tmp"))


def test_the_least_recently_used_shards_make_room(
    bucket: str, machine: Path, t2v_shards: Path
) -> None:
    first, second, third = [s for s in committed_shards(t2v_shards) if s.kind == "samples"][:3]
    limit = (max(first.bytes + third.bytes, first.bytes + second.bytes) + 1) / 1e9
    shards = open_store(bucket, shard_cache_gb=limit)
    shards.pull()
    for shard in (first, second, first, third):
        shards.shard_file(shards.folder / shard.shard)
    assert set(_fetched(machine)) == {first.sha256, third.sha256}


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(
    bucket: str, store: ObjectStore, machine: Path, t2v_shards: Path
) -> None:
    shards = open_store(bucket)
    shards.pull()
    shard = next(s for s in committed_shards(t2v_shards) if s.kind == "samples")
    place = f"{BUCKET}/train/{shard.shard}"
    whole = store.files().cat_file(place)
    store.files().pipe_file(place, whole[:-1] + b"x")
    try:
        with pytest.raises(UserError, match=f"{bucket}/{shard.shard} is damaged: its SHA-256"):
            shards.shard_file(shards.folder / shard.shard)
        store.files().rm_file(place)
        with pytest.raises(UserError, match="there is no such bucket or object"):
            shards.shard_file(shards.folder / shard.shard)
    finally:
        store.files().pipe_file(place, whole)
    assert _fetched(machine) == {} and not list((machine / "shards").glob("*.tmp"))
    assert shards.shard_file(shards.folder / shard.shard).read_bytes() == whole
