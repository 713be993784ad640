"""Content digests and their memo."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.io.hashing import FileHasher, digest_of


def test_the_memo_saves_the_second_read(tmp_path: Path) -> None:
    memo, file = tmp_path / "memo" / "sha256.jsonl", tmp_path / "file"
    file.write_bytes(b"one")
    digest = FileHasher(memo).sha256(file)
    assert digest == hashlib.sha256(b"one").hexdigest()
    again = FileHasher(memo)
    assert again.known(again.name(file)) == digest


@pytest.mark.parametrize("how", ["touch -r", "mv", "cp -p"])
def test_other_content_of_equal_size_and_time_is_read_again(how: str, tmp_path: Path) -> None:
    memo, file, other = tmp_path / "memo", tmp_path / "file", tmp_path / "other"
    file.write_bytes(b"one")
    other.write_bytes(b"two")
    shutil.copystat(file, other)
    assert FileHasher(memo).sha256(file) == hashlib.sha256(b"one").hexdigest()
    before = file.stat()
    if how == "touch -r":
        file.write_bytes(b"two")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        subprocess.run([*how.split(), other, file], check=True)
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert FileHasher(memo).sha256(file) == hashlib.sha256(b"two").hexdigest()


def test_a_torn_memo_or_none_costs_only_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    expected = hashlib.sha256(b"one").hexdigest()
    memo = tmp_path / "memo"
    memo.write_bytes(b'{"file": "x", "sha\n\xff\n7\n{"a": 1}\n')
    assert FileHasher(memo).sha256(file) == expected
    blocked = tmp_path / "file" / "memo"  # below a file, nothing can be written
    assert FileHasher(blocked).sha256(file) == expected


def test_combined_ignores_folder_and_order(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            (tmp_path / folder / name).write_text(name)
    hasher = FileHasher(tmp_path / "memo")
    one = hasher.combined([tmp_path / "a/x", tmp_path / "a/y"])
    assert one == hasher.combined([tmp_path / "b/y", tmp_path / "b/x"])
    assert one != hasher.combined([tmp_path / "b/y"])


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        FileHasher(tmp_path / "memo").sha256(tmp_path / "none")


def test_digests_are_pinned() -> None:
    """Golden: keys and index digests of every cache are made with this."""
    assert digest_of({"b": [1, None, "ü"], "a": 1.5}) == digest_of({"a": 1.5, "b": [1, None, "ü"]})
    canonical = '{"a":1.5,"b":[1,null,"ü"]}'.encode()
    assert digest_of({"b": [1, None, "ü"], "a": 1.5}) == hashlib.sha256(canonical).hexdigest()
