"""The states of synthesised samples: in tars, in the index, in an object store's rows, checked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zarr
from rich.console import Console

from preprocess.cache.compact import compact
from preprocess.cache.index import build_index
from preprocess.cache.shard_rows import pack_rows, scan_shard, stored_rows
from preprocess.cache.writer import ShardWriter
from preprocess.verify.cache_check import verify
from shared.errors import UserError
from shared.format.cache import MemberReader, committed_shards, open_cache
from shared.format.fingerprint import differences, state_timesteps
from shared.format.prompts import Prompt
from shared.format.schema import STATES_MEMBER
from shared.io.mirror import ROWS_SUFFIX
from shared.io.store import Store
from tests.preprocess.cache.test_format import fixed_sample

SYNTHESIS = {"model": "m", "steps": 4, "states": {"timesteps": [1000.0, 750.0]}}
FINGERPRINT = {
    "format": 1,
    "mode": "t2v",
    "latents": {"channels": 2, "stride": [4, 8, 8], "dtype": "bf16", "compute": "bf16"},
    "text": {"dim": 4, "max_length": 512, "dtype": "bf16", "compute": "bf16"},
    "media": {"seed": 1},
    "synthesis": SYNTHESIS,
}


def states(number: int) -> torch.Tensor:
    return torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(number)).bfloat16()


def cache(folder: Path, *, with_states: bool = True) -> Store:
    folder.mkdir(exist_ok=True)
    store = Store(folder)
    without = {**FINGERPRINT, "synthesis": {**SYNTHESIS, "states": None}}
    writer = ShardWriter(store, FINGERPRINT if with_states else without, shard_bytes=10**9)
    writer.add_prompts(
        [Prompt(role, role, torch.ones(1, 4).bfloat16()) for role in ("empty", "negative")]
    )
    for number in range(3):
        sample = fixed_sample(number, f"caption {number}")
        writer.add(replace(sample, states=states(number)) if with_states else sample)
    writer.close()
    build_index(store)
    return store


def test_states_are_read_by_the_index_and_survive_what_changes_a_cache(tmp_path: Path) -> None:
    store = cache(tmp_path)
    expected = {fixed_sample(n, "").key: states(n) for n in range(3)}

    def check() -> None:
        index = open_cache(store)
        assert {index.key(row) for row in range(len(index))} == expected.keys()
        for row in range(len(index)):
            found = MemberReader(index).read(row, STATES_MEMBER)
            assert found is not None and found["states"].equal(expected[index.key(row)])
        assert not verify(store, Console(quiet=True)).findings

    check()
    # Columns that were there before it are as they were: an older reader reads on.
    group = zarr.open_group(tmp_path / "index.zarr", mode="r")
    assert group["offset"].shape == (3, 4) and group["states"].shape == (3, 2)
    assert "states" not in zarr.open_group(
        cache(tmp_path / "without", with_states=False).folder / "index.zarr", mode="r"
    )
    # What lies in an object store beside the tar.
    sidecar = next(one for one in committed_shards(tmp_path) if one.kind == "samples")
    columns = scan_shard(store, sidecar)
    rows = tmp_path / sidecar.shard
    rows.with_suffix(ROWS_SUFFIX).write_bytes(pack_rows(columns, sidecar.sha256))
    stored = stored_rows(tmp_path, sidecar)
    assert stored is not None and all((stored[name] == columns[name]).all() for name in columns)
    rows.with_suffix(ROWS_SUFFIX).unlink()
    # Copied by `compact`.
    gone = min(expected)
    ShardWriter(store, FINGERPRINT, shard_bytes=1).add_tombstones([gone])
    compact(store, shard_bytes=10**9)
    del expected[gone]
    check()


def test_states_that_are_not_as_the_fingerprint_says_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = ShardWriter(store, FINGERPRINT, shard_bytes=10**9)
    lacking, cut, flat = (fixed_sample(n, "c") for n in range(3))
    writer.add(lacking)
    writer.add(replace(cut, states=states(1)[:1]))
    writer.add(replace(flat, states=torch.ones(2, 2, 3, 2, 2).bfloat16()))
    writer.close()
    build_index(store)
    found = {(f.key, f.code) for f in verify(store, Console(quiet=True)).findings if f.key}
    assert found == {
        (lacking.key, "member-missing"),
        (cut.key, "states-shape"),
        (flat.key, "states-constant"),
    }


def test_a_synthesised_cache_does_not_mix_with_another(tmp_path: Path) -> None:
    media = {name: value for name, value in FINGERPRINT.items() if name != "synthesis"}
    without = {**FINGERPRINT, "synthesis": {**SYNTHESIS, "states": None}}
    assert not differences(FINGERPRINT, FINGERPRINT)
    for one, other in ((media, FINGERPRINT), (without, FINGERPRINT), (media, without)):
        assert differences(one, other) and differences(other, one)
    del media["media"]  # what a model says of itself
    assert not differences(FINGERPRINT, media)
    store = cache(tmp_path)
    with pytest.raises(UserError, match="synthesis"):
        ShardWriter(store, without, shard_bytes=1).add(fixed_sample(9, "x"))
        build_index(store)


@pytest.mark.parametrize("states", [[1], {}, {"timesteps": [0]}, {"timesteps": ["1"]}, "x"])
def test_states_that_no_fingerprint_has(states: object) -> None:
    with pytest.raises(ValueError, match="synthesis"):
        state_timesteps({"synthesis": {"states": states}})
    assert state_timesteps(json.loads(json.dumps(FINGERPRINT))) == (1000, 750)
    assert state_timesteps({}) == state_timesteps({"synthesis": {"states": None}}) == ()
