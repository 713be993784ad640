"""Files that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from shared.io.durable import TEMPORARY_SUFFIX, write_bytes, write_json


def test_written_whole_and_nothing_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    write_json(path, {"text": "ü", "n": 1})
    assert json.loads(path.read_text()) == {"text": "ü", "n": 1}
    write_bytes(path, b"other")
    assert path.read_bytes() == b"other"
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": True})
    (tmp_path / f"value.json{TEMPORARY_SUFFIX}").mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
