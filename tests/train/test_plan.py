"""The batch plan: nothing lost, nothing doubled, the same however it is cut."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from train.plan import BatchPlan, micro_batch

SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=5).filter(any)


def _buckets(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)


def _plan(sizes: list[int], batch: int, *, tail: str = "pad", repeat: int = 1) -> BatchPlan:
    buckets = _buckets(sizes)
    repeats = np.full(len(buckets), repeat, dtype=np.int64)
    return BatchPlan(buckets, repeats, batch, seed=5, tail=tail)  # type: ignore[arg-type]


@given(SIZES, st.integers(1, 7), st.integers(1, 3), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_padding_shows_every_sample_and_fills_from_its_bucket(
    sizes: list[int], batch: int, repeat: int, epoch: int
) -> None:
    plan = _plan(sizes, batch, repeat=repeat)
    order = plan.epoch(epoch)
    assert order.shape == (plan.batches_per_epoch, batch)
    counts = Counter(order.flatten().tolist())
    assert set(counts) == set(range(sum(sizes)))
    assert all(count >= repeat for count in counts.values())
    assert sum(counts.values()) - repeat * sum(sizes) == plan.tail_samples
    for rows in order:
        assert len(set(_buckets(sizes)[rows].tolist())) == 1


@given(SIZES, st.integers(1, 7), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_dropping_shows_no_sample_twice(sizes: list[int], batch: int, epoch: int) -> None:
    if max(sizes) < batch:
        with pytest.raises(UserError, match="no full batch"):
            _plan(sizes, batch, tail="drop")
        return
    plan = _plan(sizes, batch, tail="drop")
    counts = Counter(plan.epoch(epoch).flatten().tolist())
    assert max(counts.values()) == 1
    assert sum(sizes) - sum(counts.values()) == plan.tail_samples


def test_epochs_differ_and_repeat_themselves() -> None:
    plan = _plan([13, 8], 3)
    assert np.array_equal(plan.epoch(2), _plan([13, 8], 3).epoch(2))
    assert not np.array_equal(plan.epoch(2), plan.epoch(3))
    at = plan.batches_per_epoch
    assert np.array_equal(plan.batch(2 * at + 1), plan.epoch(2)[1])


def test_order_is_pinned() -> None:
    # Golden: a changed order would make every resumed run silently see other data.
    expected = [[8, 6], [1, 4], [2, 0], [7, 5], [4, 3]]
    assert _plan([5, 4], 2).epoch(0).tolist() == expected


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_ranks_and_micro_steps_share_a_batch(ranks: int, accumulation: int) -> None:
    shares = [
        list(
            micro_batch(12, micro_step=step, rank=rank, world_size=ranks, accumulation=accumulation)
        )
        for step in range(accumulation)
        for rank in range(ranks)
    ]
    assert sorted(position for share in shares for position in share) == list(range(12))
    assert len({len(share) for share in shares}) == 1
