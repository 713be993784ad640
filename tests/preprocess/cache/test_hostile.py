"""Caches that someone made to do harm, or that a disk has: a whole result or one message.

Each is consistent where its author could make it so: sidecars and digests agree with what was
changed.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.cache.index import build_index
from shared.cache.shard_rows import pack_rows, scan_shard, stored_rows
from shared.errors import UserError
from shared.format.cache import MANIFEST, Sidecar, open_cache
from shared.format.columns import COLUMNS, OPTIONAL
from shared.format.prompts import read_prompts
from shared.format.schema import JSON_MEMBER, LATENTS_MEMBER, MEMBERS, TEXT_MEMBER
from shared.io.mirror import ROWS_SUFFIX
from shared.io.store import Store
from tests.preprocess import hostile
from tests.preprocess.conftest import REPOSITORY, wanprep
from tests.preprocess.hostile import (
    copy,
    make_consistent,
    read,
    rebuilt,
    replace_tar,
    rewrite_column,
    rewrite_json,
    sample,
    shard,
    with_members,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make(tmp_path_factory.mktemp("hostile") / "shards")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be harmed."""
    return copy(whole, tmp_path / "shards")


def refused(folder: Path) -> str:
    """What `wanprep index` says, as a user would see it."""
    ran = wanprep("index", "--shards", folder)
    assert ran.code == 1 and "Traceback" not in ran.err, ran
    assert ran.err.startswith("error: ") and ("wanprep" in ran.err or "null" in ran.err)
    return ran.err


def test_the_control(whole: Path, folder: Path) -> None:
    contents = read(whole)
    assert len(contents) == 4 and len(contents["prompts"]) == 2
    assert contents[sample(0).key]["shapes"][TEXT_MEMBER] == {"text": (3, 4)}  # the overlay's
    assert rebuilt(folder) == contents
    with_members(folder, 0, {})
    assert rebuilt(folder).keys() == {sample(0).key, sample(2).key, "prompts"}


# Cut off.


def without_padding(tar: Path) -> bytes:
    """The shortest form of a tar: two blocks of zeros after the last member."""
    data = tar.read_bytes()
    data = data[: len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024]
    tar.write_bytes(data)
    make_consistent(tar)
    return data


@pytest.mark.long
def test_a_shard_cut_at_every_byte(folder: Path) -> None:
    """Never a traceback, never a smaller cache that is taken for whole."""
    tar = shard(folder)
    data = without_padding(tar)
    sidecar = tar.with_suffix(".json").read_text()
    contents = rebuilt(folder)

    def is_refused() -> None:
        with pytest.raises(UserError, match="wanprep encode") as error:
            build_index(Store(folder))
        assert tar.name in str(error.value)

    for end in range(len(data)):
        tar.write_bytes(data[:end])
        tar.with_suffix(".json").write_text(sidecar)
        is_refused()
        if end % 512 == 0 or end % 50 == 0:  # with a sidecar that agrees, also about the count
            for count in (0, 1, 2):
                make_consistent(tar, count=count)
                is_refused()
    tar.write_bytes(data)
    make_consistent(tar)
    assert rebuilt(folder) == contents


def test_a_prompt_bank_cut_at_every_byte(folder: Path) -> None:
    tar = shard(folder, "prompts")
    data = without_padding(tar)
    assert len(read_prompts(Store(folder), (tar.name,))) == 2
    for end in range(len(data)):
        tar.write_bytes(data[:end])
        with pytest.raises(UserError, match=f"{tar.name} is damaged"):
            read_prompts(Store(folder), (tar.name,))


@pytest.mark.parametrize("end", [0, 1, 511, 512, 1024, 3000, 5000, 9999])
def test_a_cut_shard_at_the_command_line(folder: Path, end: int) -> None:
    tar = shard(folder)
    tar.write_bytes(tar.read_bytes()[:end])
    assert f"{tar} is damaged: its SHA-256" in refused(folder)
    make_consistent(tar)
    assert f"{tar} is damaged (" in refused(folder)


# Hostile tars, whose sidecars agree with them.


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b.json", "x.json", f"{sample(5).key}.pth"]
)
def test_names_that_are_paths(folder: Path, name: str) -> None:
    for tar in (shard(folder), bank := shard(folder, "prompts")):
        replace_tar(tar, [(tarfile.TarInfo(name), b"x")], count=1)
    assert "unexpected member" in (said := refused(folder)) and name in said
    with pytest.raises(UserError, match="unexpected member"):
        read_prompts(Store(folder), (bank.name,))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(folder: Path, kind: bytes) -> None:
    info = tarfile.TarInfo(f"{sample(0).key}.json")
    info.type, info.linkname = kind, "/etc/passwd"
    replace_tar(shard(folder), [(info, b"")], count=1)
    assert "is no regular file" in refused(folder)


def test_a_member_twice(folder: Path) -> None:
    files = [
        (tarfile.TarInfo(f"{sample(0).key}.{name}"), data)
        for name, data in sample(0).members().items()
    ]
    replace_tar(shard(folder), [*files, files[-1]], count=1)
    assert "occurs twice" in refused(folder)
    replace_tar(shard(folder), [*files, *files], count=2)
    assert "occurs twice" in refused(folder)


def test_an_absurd_size(folder: Path) -> None:
    tar = shard(folder)
    data = bytearray(tar.read_bytes())
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    tar.write_bytes(data)
    make_consistent(tar)
    assert "claims 8589934591 bytes" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": 3}, "caption is 3"),
        ({"caption": "\ud800"}, "surrogates not allowed"),
        ({"type": "audio"}, "type is 'audio'"),
        ({"type": ["video"]}, "type is ['video']"),
        ({"source": None}, "source is None"),
        ({"frames": 9}, "a sample of 16x24x9 in a shard of 16x24x5"),
        ({"frames": 5.0}, "frames is 5.0"),
        ({"width": True}, "width is True"),
        ({"frame_indices": "01234"}, "frame_indices is"),
        ({"frame_indices": [0, -1]}, "frame_indices is"),
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": 10**9}, "repeats is 1000000000"),
        ({"repeats": float("nan")}, "NaN is no JSON"),
    ],
    ids=str,
)
def test_an_entry_of_the_wrong_kind(folder: Path, change: dict[str, Any], message: str) -> None:
    info = json.loads(sample(0).info.to_bytes()) | change
    tar = with_members(folder, 0, {JSON_MEMBER: json.dumps(info).encode()})
    said = refused(folder)
    assert message in said and f"{tar} is damaged ({sample(0).key}.json: " in said


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b'{"caption":' * 9000, b"[" * 200_000, b'{"a":1,"a":2}']
)
def test_an_entry_that_is_none(folder: Path, text: bytes) -> None:
    with_members(folder, 0, {JSON_MEMBER: text})
    assert f"{sample(0).key}.json: " in refused(folder)


def test_a_tensor_of_another_kind(folder: Path) -> None:
    with_members(folder, 0, {LATENTS_MEMBER: sample(0).members()[TEXT_MEMBER]})
    assert "latents.safetensors: it holds ['text'], expected 'latents'" in refused(folder)
    long = hostile.pack(text=torch.zeros(513, 4))
    with_members(folder, 0, {TEXT_MEMBER: long})
    assert "513 tokens, expected at most 512" in refused(folder)


# Sidecars, manifest, index.


def _sidecar(folder: Path) -> Path:
    return shard(folder).with_suffix(".json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shard", "../../etc/passwd"),
        ("shard", "/etc/passwd"),
        ("shard", 3),
        ("kind", "pickles"),
        ("kind", ["samples"]),
        ("sha256", "0"),
        ("bytes", -1),
        ("bytes", 1e300),
        ("count", "2"),
        ("count", 10**30),
        ("bucket", {"height": -16, "width": 16, "frames": 5}),
        ("bucket", {"height": 24, "width": 16, "frames": "5"}),
        ("bucket", [1, 2, 3]),
        ("bucket", None),
        ("fingerprint", []),
        ("fingerprint", {"format": 1, "latents": 3}),
        ("fingerprint", {"format": 1, "overlay": ["captions"]}),
        ("latent_rgb", 3),
        ("latent_rgb", {}),
        ("latent_rgb", {"fit": {"samples": 1, "sums": ""}, "held_out": None}),
        ("latent_rgb", {"fit": {"samples": 1e999, "sums": "AA=="}, "held_out": None}),
    ],
    ids=str,
)
def test_a_sidecar_with_another_value(folder: Path, field: str, value: object) -> None:
    rewrite_json(_sidecar(folder), lambda sidecar: {**sidecar, field: value})
    assert _sidecar(folder).name in refused(folder)


def test_sums_of_colours_that_are_none(folder: Path) -> None:
    import base64

    def change(value: float, count: int) -> Callable[[Any], Any]:
        sums = base64.b64encode(np.full(count, value).tobytes()).decode()
        part = {"samples": 1, "sums": sums}
        return lambda sidecar: {**sidecar, "latent_rgb": {"fit": part, "held_out": part}}

    for value in (np.nan, np.inf, 1e300):
        rewrite_json(_sidecar(folder), change(value, 18))
        assert "latent_rgb of" in refused(folder)
    rewrite_json(_sidecar(folder), change(1.0, 24 + 1))  # of another number of channels
    assert "latent_rgb" in refused(folder)


def test_a_nested_fingerprint(folder: Path) -> None:
    deep: Any = 0
    for _ in range(600):
        deep = {"a": deep}
    rewrite_json(_sidecar(folder), lambda sidecar: {**sidecar, "fingerprint": deep})
    assert "nested too deeply" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 200_000, '{"format": NaN}', "\x00"])
@pytest.mark.parametrize("which", ["sidecar", "tombstones"])
def test_files_that_hold_no_object(folder: Path, which: str, text: str) -> None:
    path = _sidecar(folder) if which == "sidecar" else min(folder.glob("tombstones-*.json"))
    path.write_text(text)
    assert path.name in refused(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shards", [{"name": "../../etc/passwd", "bytes": 1}]),
        ("shards", [{"name": "/etc/passwd", "bytes": 1}]),
        ("shards", [{"name": "h24-w16-f5-w000-00001.tar/../x", "bytes": 1}]),
        ("shards", [{"name": "h24-w16-f5-w000-00001.tar", "bytes": -1}]),
        ("shards", [{"name": "prompts-w000-00000.tar", "bytes": 1}]),
        ("prompts", [{"name": "../prompts-w000-00000.tar", "bytes": 1}]),
        ("prompts", [{"name": "h24-w16-f5-w000-00001.tar", "bytes": 1}]),
        ("shards", 3),
        ("samples", -1),
        ("samples", 1e9),
        ("samples", 2),
        ("samples", 10**15),
        ("buckets", [{"height": 1e9, "width": 16, "frames": 5}]),
        ("fingerprint", {"text": []}),
        ("latent_rgb", {"weight": [[1e999] * 3], "bias": [0] * 3}),
        ("latent_rgb", {"weight": 0, "bias": 0, "r2": 0, "samples": 0, "held_out": 0}),
        ("latent_rgb", "x"),
        ("index", None),
    ],
    ids=str,
)
def test_a_manifest_with_another_value(folder: Path, field: str, value: object) -> None:
    rewrite_json(folder / MANIFEST, lambda manifest: {**manifest, field: value})
    with pytest.raises(UserError, match=re.escape(f"wanprep index --shards {folder}")):
        open_cache(Store(folder)).read_columns()
    assert rebuilt(folder)  # what it is derived from is whole


@pytest.mark.parametrize(
    ("column", "field", "value"),
    [
        ("key", "shape", [10**15, 16]),
        ("key", "shape", [3]),
        ("key", "shape", [-1, 16]),
        ("offset", "data_type", "float64"),
        ("offset", "data_type", "variable_length_utf8"),
        ("offset", "data_type", "object"),
        ("key", "codecs", [{"name": "numcodecs.pickle"}]),
        ("key", "codecs", [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 0}}]),
        ("key", "chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 1]}}),
        ("key", "chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [10**15, 16]}}),
        ("key", "chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [0, 16]}}),
        ("key", "chunk_grid", None),
        ("key", "storage_transformers", [{"name": "evil"}]),
        ("key", "zarr_format", 2),
    ],
    ids=str,
)
def test_a_column_of_another_form(folder: Path, column: str, field: str, value: object) -> None:
    path = folder / "index.zarr" / column / "zarr.json"
    rewrite_json(path, lambda metadata: {**metadata, field: value})
    with pytest.raises(UserError, match=f"column '{column}' of .* is damaged .*wanprep index"):
        open_cache(Store(folder)).read_columns()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("bucket", -1),
        ("bucket", 1),
        ("shard", -1),
        ("shard", 2),
        ("type", 3),
        ("tokens", -1),
        ("tokens", 513),
        ("repeats", 0),
        ("repeats", 2**31 - 1),
        ("offset", -1),
        ("offset", 2**62),
        ("offset", 10_239),
        ("length", -1),
        ("length", 2**62),
        ("key", 0),
    ],
)
def test_a_column_that_points_elsewhere(folder: Path, column: str, value: int) -> None:
    values = open_cache(Store(folder)).read_columns()[column].copy()
    values[-1] = value
    rewrite_column(folder, column, values)
    with pytest.raises(UserError, match=r"column '.*' of .* is damaged .*wanprep index"):
        open_cache(Store(folder)).read_columns()


def test_a_chunk_that_is_gone_or_longer(folder: Path) -> None:
    chunk = folder / "index.zarr" / "bucket" / "c" / "0"
    whole = chunk.read_bytes()
    for data in (whole + b"\0", whole[:-1], None):
        chunk.write_bytes(data) if data is not None else chunk.unlink()
        with pytest.raises(UserError, match=r"column 'bucket' .* is damaged"):
            open_cache(Store(folder)).read_columns()


def test_a_shard_that_is_a_pipe(folder: Path) -> None:
    """Opening one would wait for ever."""
    tar = shard(folder)
    tar.unlink()
    os.mkfifo(tar)
    assert f"{tar} is no file" in refused(folder)
    with pytest.raises(UserError, match="no regular file"):
        read(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [("type", 3), ("tokens", 513), ("tokens", -1), ("repeats", 0), ("repeats", 10**9),
     ("offset", -1), ("length", 2**62)],
)  # fmt: skip
def test_rows_beside_a_shard_that_lie(folder: Path, column: str, value: int) -> None:
    """Rows that a store holds beside a tar are left alone where no tar could have them."""
    contents = read(folder)
    tar = shard(folder)
    sidecar = Sidecar.read(Sidecar.path_for(tar))
    columns = scan_shard(Store(folder), sidecar)
    path = tar.with_suffix(ROWS_SUFFIX)
    path.write_bytes(pack_rows(columns, sidecar.sha256))
    assert stored_rows(folder, sidecar) is not None  # the control
    columns[column][0] = value
    path.write_bytes(pack_rows(columns, sidecar.sha256))
    assert stored_rows(folder, sidecar) is None
    assert rebuilt(folder) == contents


# No pickle, whatever lies there.


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    """In a process whose audit hook ends it at the first unpickling; the control shows that."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.preprocess.unpickling", str(folder), str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("refused: ") == 10 and ran.stdout.endswith("control: unpickled\n")
    assert not (tmp_path / "harmed").exists()


# Fuzzing: the only outcomes are a whole result and a message.

Change = tuple[str, int, int, bytes]
bytes_changed = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut", "splice", "zero"]),
        st.integers(0, 1 << 20),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=24),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[Change]) -> bytes:
    for what, at, other, new in changes:
        at, other = at % (len(data) + 1), other % (len(data) + 1)
        end = min(len(data), at + len(new))
        if what == "flip":
            flipped = bytes(a ^ b for a, b in zip(data[at:end], new, strict=False))
            data = data[:at] + flipped + data[end:]
        elif what == "insert":
            data = data[:at] + new + data[at:]
        elif what == "cut":
            data = data[:at] + data[end:]
        elif what == "splice":
            data = data[:at] + data[other : other + 512] + data[min(len(data), at + 512) :]
        else:
            data = data[:at] + bytes(end - at) + data[end:]
    return data


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63), 10**40, 1e308, 1e999, -0.0, "", "../../etc/passwd", "bf16"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


def json_changed(value: Any, path: int, new: Any) -> Any:
    """`value` with one of its inner values replaced (or, for a third, removed)."""
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        keys = inner.keys() if isinstance(inner, dict) else range(len(inner))
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    container, key = places[path % len(places)]
    if path % 3:
        container[key] = new
    else:
        del container[key]
    return value


def files(folder: Path) -> list[Path]:
    """All of a cache's files, its overlay's too."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name)


def outcome(reader: Callable[[Path], object], folder: Path) -> None:
    """A result or a message; any other exception fails the test."""
    try:
        reader(folder)
    except UserError as error:
        assert str(error)


QUIET = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
EXAMPLES = pytest.mark.parametrize(
    "examples", [20, pytest.param(100, marks=pytest.mark.long)], ids=["few", "many"]
)
positions = st.integers(0, 1 << 20)


@EXAMPLES
def test_changed_bytes_of_any_file(whole: Path, tmp_path: Path, examples: int) -> None:
    @settings(QUIET, max_examples=examples)
    @given(file=positions, changes=bytes_changed, agree=st.booleans())
    def run(file: int, changes: list[Change], agree: bool) -> None:
        folder = copy(whole, tmp_path / "shards")
        paths = files(folder)
        path = paths[file % len(paths)]
        path.write_bytes(mutated(path.read_bytes(), changes))
        if agree and path.suffix == ".tar":
            make_consistent(path)
        outcome(read, folder)
        outcome(rebuilt, folder)

    run()


@EXAMPLES
def test_changed_values_of_any_json(whole: Path, tmp_path: Path, examples: int) -> None:
    @settings(QUIET, max_examples=examples)
    @given(file=positions, place=positions, new=json_values)
    def run(file: int, place: int, new: object) -> None:
        folder = copy(whole, tmp_path / "shards")
        paths = [path for path in files(folder) if path.suffix == ".json"]
        path = paths[file % len(paths)]
        path.write_text(json.dumps(json_changed(json.loads(path.read_text()), place, new)))
        outcome(read, folder)
        outcome(rebuilt, folder)

    run()


@EXAMPLES
@pytest.mark.parametrize("member", MEMBERS[:4])
def test_changed_bytes_of_a_member(whole: Path, tmp_path: Path, member: str, examples: int) -> None:
    """Most changes fall into a header, which decides what would be done with the rest."""
    folder = copy(whole, tmp_path / "shards")

    @settings(QUIET, max_examples=examples)
    @given(changes=bytes_changed)
    def run(changes: list[Change]) -> None:
        data = sample(0).members()[member]
        changes = [(what, at % 160, other % 160, new) for what, at, other, new in changes]
        with_members(folder, 0, {member: mutated(data, changes)})
        outcome(rebuilt, folder)

    run()


@EXAMPLES
def test_changed_values_of_columns(whole: Path, tmp_path: Path, examples: int) -> None:
    folder = copy(whole, tmp_path / "shards")
    columns = open_cache(Store(folder)).read_columns()

    @settings(QUIET, max_examples=examples)
    @given(
        name=st.sampled_from(sorted(COLUMNS.keys() - set(OPTIONAL))),
        row=positions,
        value=st.integers(-4, 2**63),
    )
    def run(name: str, row: int, value: int) -> None:
        values = columns[name].copy()
        limits = np.iinfo(values.dtype)
        values[row % len(values)] = min(max(value, int(limits.min)), int(limits.max))
        rewrite_column(folder, name, values)
        outcome(read, folder)
        rewrite_column(folder, name, columns[name])

    run()
