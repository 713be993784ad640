"""Batches against the shards as plain webdataset reads them."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from shared.format.cache import MemberReader, open_cache
from shared.format.schema import STATES_MEMBER
from shared.io.store import Store
from shared.models.spec import read_model_spec
from shared.models.wan import WAN
from tests.train.conftest import encode
from tests.train.synthesised import timesteps, with_states
from train.data.batch_plan import BatchPlan
from train.data.batches import Batch, MicroBatches, load_prompt_bank
from train.data.dataset import dataset_of
from train.functional.rng import noise

CPU = torch.device("cpu")


def _dataset(
    shards: Path,
    model: Path,
    *,
    dropout: float = 0.0,
    batch: int = 2,
    frame_crop: bool = False,
    **cut: int,
) -> MicroBatches:
    index = open_cache(Store(shards))
    plan = BatchPlan(index.bucket_ids, np.ones(len(index), np.int64), batch, seed=4)
    return MicroBatches(
        dataset_of([(index, Fraction(1))]),
        plan,
        read_model_spec(model),
        empty_text=load_prompt_bank(index, WAN).empty,
        caption_dropout=dropout,
        frame_crop=frame_crop,
        **({"accumulation": 1, "data_rank": 0, "data_size": 1} | cut),  # type: ignore[arg-type]
    )


def _plain(shards: Path) -> dict[str, dict[str, bytes]]:
    tars = [str(path) for path in sorted(shards.glob("h*.tar"))]
    return {s["__key__"]: s for s in webdataset.WebDataset(tars, shardshuffle=False)}


def _epoch(dataset: MicroBatches, workers: int, updates: int = 4) -> list[Batch]:
    """Held all together, so that memory in use is not used again."""
    return [batch.to(CPU) for batch in dataset.ahead(start=0, stop=updates, workers=workers)]


def test_batches_hold_what_is_in_the_shards(i2v_shards: Path, tiny_i2v: Path) -> None:
    plain, seen = _plain(i2v_shards), set()
    for batch in _epoch(_dataset(i2v_shards, tiny_i2v), workers=0):
        assert batch.condition is not None
        for row, key in enumerate(batch.keys):
            seen.add(key)
            sample = plain[key]
            latents = load(sample["latents.safetensors"])["latents"]
            assert torch.equal(batch.latents[row], latents.float())
            text = load(sample["text.safetensors"])["text"]
            assert torch.equal(batch.text[row, : len(text)], text)
            assert batch.text.shape[1] == 512 and not batch.text[row, len(text) :].any()
            cond = load(sample["cond.safetensors"])["cond"].float()
            assert torch.equal(batch.condition[row, 4:], cond)
            mask = torch.zeros(4, *cond.shape[1:], dtype=cond.dtype)
            if b'"type": "video"' in sample["json"]:
                mask[:, 0] = 1
            assert torch.equal(batch.condition[row, :4], mask)
    assert seen == set(plain)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again_by_nobody_too_early(
    i2v_shards: Path, tiny_i2v: Path, workers: int
) -> None:
    """Each batch right while later ones are read into what earlier ones left."""
    plain = _plain(i2v_shards)
    dataset = _dataset(i2v_shards, tiny_i2v)
    places = set()
    for batch in dataset.ahead(start=0, stop=40, workers=workers):
        assert batch.condition is not None
        places.add(batch.latents.data_ptr())
        for row, key in enumerate(batch.keys):
            held = (batch.latents[row], batch.condition[row], batch.texts[row])
            wanted = (("latents", "latents"), ("cond", "cond"), ("text", "text"))
            for tensor, (member, name) in zip(held, wanted, strict=True):
                assert torch.equal(tensor, load(plain[key][f"{member}.safetensors"])[name])
    assert len(places) < 20


def test_one_frame_of_a_video_has_no_condition(
    dataset: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    """A token budget may cut a video so short; its condition is the encoding of zeros, not it."""
    shards = encode(dataset, tiny_i2v, tmp_path / "shards", "--video-sample-n-frames", "1")
    plain = _plain(shards)
    assert sum(b'"type": "video"' in sample["json"] for sample in plain.values()) == 5
    for batch in _epoch(_dataset(shards, tiny_i2v), workers=0):
        assert batch.condition is not None and batch.condition.shape[2] == 1
        assert not batch.condition[:, :4].any()


def test_workers_change_nothing(t2v_shards: Path, tiny_t2v: Path) -> None:
    dataset = _dataset(t2v_shards, tiny_t2v, dropout=0.5)
    inline, parallel = _epoch(dataset, 0, updates=9), _epoch(dataset, 2, updates=9)
    for one, other in zip(inline, parallel, strict=True):
        assert one.keys == other.keys and one.update == other.update
        assert torch.equal(one.latents, other.latents) and torch.equal(one.text, other.text)


def test_ranks_together_see_what_one_process_sees(t2v_shards: Path, tiny_t2v: Path) -> None:
    whole = _epoch(_dataset(t2v_shards, tiny_t2v, dropout=0.5), 0)
    halves = [
        _epoch(_dataset(t2v_shards, tiny_t2v, dropout=0.5, data_rank=rank, data_size=2), 0)
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch.keys == first.keys + second.keys
        assert batch.samples == first.samples + second.samples
        assert torch.equal(batch.text, torch.cat([first.text, second.text]))


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_caption_dropout_takes_the_empty_prompt(
    t2v_shards: Path, tiny_t2v: Path, dropout: float, low: int, high: int
) -> None:
    dataset = _dataset(t2v_shards, tiny_t2v, dropout=dropout)
    empty = load_prompt_bank(open_cache(Store(t2v_shards)), WAN).empty
    dropped = sum(
        bool(torch.equal(text, empty)) for batch in _epoch(dataset, 0, 100) for text in batch.text
    )
    assert low <= dropped <= high


def test_a_damaged_member_is_named_with_its_shard(
    i2v_shards: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    import shutil

    from shared.errors import UserError
    from shared.format.schema import LATENTS_MEMBER, MEMBERS

    copy = tmp_path / "shards"
    shutil.copytree(i2v_shards, copy)
    index = open_cache(Store(copy))
    at = int(index.offsets[0, MEMBERS.index(LATENTS_MEMBER)])
    shard = copy / index.shards[int(index.shard_ids[0])]
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[at : at + 8] = b"\xff" * 8  # the length of the safetensors header
    shard.write_bytes(bytes(data))
    for workers in (0, 2):
        with pytest.raises(
            UserError, match=rf"{shard.name}: sample {index.key(0)}: latents.*damaged"
        ):
            _epoch(_dataset(copy, tiny_i2v), workers)


def test_captions_are_dropped_sample_by_sample(t2v_shards: Path, tiny_t2v: Path) -> None:
    """In a batch of two, one caption may go and the other stay, first or second; by update too."""
    dataset = _dataset(t2v_shards, tiny_t2v, dropout=0.5)
    empty = load_prompt_bank(open_cache(Store(t2v_shards)), WAN).empty
    patterns = [
        tuple(bool(torch.equal(text, empty)) for text in batch.text)
        for batch in _epoch(dataset, 0, 100)
    ]
    for pattern in ((True, True), (True, False), (False, True), (False, False)):
        assert 10 <= patterns.count(pattern) <= 45, pattern


def test_the_first_noise_comes_with_the_batch(t2v_shards: Path, tiny_t2v: Path) -> None:
    """Drawn by the threads that read ahead; other streams on demand. Both as the function says."""
    plain = _dataset(t2v_shards, tiny_t2v, frame_crop=True)
    for batch in _epoch(replace(plain, first_noise="rollout 0"), workers=2):
        assert list(batch.drawn) == [(4, "rollout 0")]
        for stream in ("rollout 0", "score noise"):
            expected = noise(batch.latents.shape[1:], 4, stream, batch.update, batch.samples)
            assert torch.equal(batch.noise(4, stream), expected)
        assert batch.noise(4, "rollout 0") is batch.drawn[4, "rollout 0"]
        assert not torch.equal(batch.noise(5, "rollout 0"), batch.noise(4, "rollout 0"))


@pytest.fixture(scope="module")
def states_shards(i2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_states(i2v_shards, tmp_path_factory.mktemp("states") / "shards", timesteps(5))


@pytest.mark.parametrize("steps", [range(1), range(2, 4), range(4)])
def test_states_are_those_of_the_steps_that_are_asked_for(
    states_shards: Path, tiny_i2v: Path, steps: range
) -> None:
    """Read with the rest into memory that is used again; cut as the latents are."""
    plain = _plain(states_shards)
    dataset = replace(_dataset(states_shards, tiny_i2v, frame_crop=True), states=steps)
    cut = 0
    for batch in dataset.ahead(start=0, stop=40, workers=2):
        assert batch.states is not None
        on_device = batch.to(CPU).states
        assert on_device is not None and on_device.dtype == torch.float32
        frames = batch.latents.shape[2]
        for row, key in enumerate(batch.keys):
            stored = load(plain[key]["states.safetensors"])["states"]
            wanted = stored[steps.start : steps.stop, :, :frames]
            assert torch.equal(batch.states[row], wanted)
            assert torch.equal(on_device[row], wanted.float())
            cut += frames < stored.shape[2]
    assert cut
    for batch in _dataset(states_shards, tiny_i2v).ahead(start=0, stop=1, workers=0):
        assert batch.states is None and batch.to(CPU).states is None


def test_a_part_of_a_member_that_a_store_sent_whole(states_shards: Path) -> None:
    index = open_cache(Store(states_shards))
    reader = MemberReader(index)
    header = reader.header(0, STATES_MEMBER)
    assert header is not None
    sent = replace(header, fetched=reader.raw(0, STATES_MEMBER))
    whole = load(reader.raw(0, STATES_MEMBER))["states"]
    for one in (header, sent):
        part = torch.empty_like(whole[1:3])
        reader.read_into(one, "states", part, first=1)
        assert torch.equal(part, whole[1:3])


def test_states_of_an_image_to_video_path_of_ti2v_keep_its_first_frame(
    dataset: Path, tiny_ti2v: Path, tmp_path: Path
) -> None:
    """What is noised is what was noised when the path was sampled, not drawn anew."""
    plain = encode(dataset, tiny_ti2v, tmp_path / "plain")
    for clean in (True, False):
        shards = with_states(plain, tmp_path / f"{clean}", timesteps(5), clean_first=clean)
        batches = replace(_dataset(shards, tiny_ti2v), states=range(2))
        for batch in _epoch(batches, workers=0, updates=6):
            assert batch.noised is not None and batch.states is not None
            kept = clean and batch.latents.shape[2] > 1
            assert bool((batch.noised[:, :, 0] == (0 if kept else 1)).all())
            assert bool((batch.noised[:, :, 1:] == 1).all())
