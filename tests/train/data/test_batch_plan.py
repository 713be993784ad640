"""The batch plan: nothing lost, nothing doubled, the same however it is cut."""

import os
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from train.data.batch_plan import BatchPlan, micro_batch

SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=5).filter(any)


def _buckets(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)


@st.composite
def weighted(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Bucket of each sample, how often it is shown in so many epochs, how many these are."""
    sizes = draw(SIZES)
    epochs = draw(st.integers(1, 4))
    samples = sum(sizes)
    repeats = draw(st.lists(st.integers(1, 9), min_size=samples, max_size=samples))
    return _buckets(sizes), np.array(repeats, dtype=np.int64), epochs


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
            micro_batch(
                12, micro_step=step, data_rank=rank, data_size=ranks, accumulation=accumulation
            )
        )
        for step in range(accumulation)
        for rank in range(ranks)
    ]
    assert sorted(position for share in shares for position in share) == list(range(12))
    assert len({len(share) for share in shares}) == 1


@given(weighted(), st.integers(1, 7), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_weights_are_kept_epoch_by_epoch_and_in_the_long_run(
    samples: tuple[np.ndarray, np.ndarray, int], batch: int, until: int
) -> None:
    """Each epoch shows a sample its share of times, rounded down or up, and over any number of
    epochs as often as every other of its bucket and weight, but for one."""
    buckets, repeats, epochs = samples
    plan = BatchPlan(buckets, repeats, batch, seed=5, epochs=epochs)
    shown = np.zeros(len(buckets), dtype=np.int64)
    for epoch in range(until):
        order = plan.epoch(epoch)
        assert order.shape == (plan.batches_per_epoch, batch)  # the same number on every rank
        assert all(len(set(buckets[rows].tolist())) == 1 for rows in order)
        again = plan.tail(epoch)
        assert len(again) == plan.tail_samples
        now = np.bincount(order.ravel(), minlength=len(buckets))
        now -= np.bincount(again, minlength=len(buckets))
        for times, count in zip(repeats.tolist(), now.tolist(), strict=True):
            assert floor(Fraction(times, epochs)) <= count <= ceil(Fraction(times, epochs))
        shown += now
    beyond = shown - until * (repeats // epochs)  # the part that does not go into them evenly
    for bucket in set(buckets.tolist()):
        for rest in set((repeats[buckets == bucket] % epochs).tolist()):
            alike = beyond[(buckets == bucket) & (repeats % epochs == rest)]
            assert int(alike.max()) - int(alike.min()) <= 1
            # Rounded up to whole samples of the bucket: never too few, and hardly too many.
            exact = Fraction(rest * until, epochs) * len(alike)
            assert exact <= int(alike.sum()) < exact + until or rest == 0 == alike.sum()


def test_half_a_weight_shows_all_within_two_epochs() -> None:
    plan = BatchPlan(_buckets([6]), np.ones(6, np.int64), 3, seed=5, epochs=2)
    halves = [set(plan.epoch(epoch).ravel().tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(6))
    assert all(len(half) == 3 for half in halves)


@given(SIZES, st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_tail_is_what_is_missing(sizes: list[int], batch: int, epoch: int) -> None:
    if max(sizes) < batch:
        return
    plan = _plan(sizes, batch, tail="drop")
    seen = plan.epoch(epoch).ravel().tolist()
    assert sorted(seen + plan.tail(epoch).tolist()) == list(range(sum(sizes)))


@given(
    weighted(), st.integers(1, 3), st.integers(1, 8), st.integers(1, 3),
    st.sampled_from(["pad", "drop"]), st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_ranks_and_micro_steps_share_every_update_without_loss(
    samples: tuple[np.ndarray, np.ndarray, int],
    each: int, ranks: int, accumulation: int, tail: str, update: int,
) -> None:  # fmt: skip
    buckets, repeats, epochs = samples
    batch = each * ranks * accumulation

    def plan_of_a_rank() -> BatchPlan:
        return BatchPlan(buckets, repeats, batch, seed=5, tail=tail, epochs=epochs)  # type: ignore[arg-type]

    try:
        plans = [plan_of_a_rank() for _ in range(ranks)]
    except UserError:
        return
    assert len({plan.batches_per_epoch for plan in plans}) == 1
    shares = []
    for step in range(accumulation):
        for rank, plan in enumerate(plans):
            where = micro_batch(
                batch, micro_step=step, data_rank=rank, data_size=ranks, accumulation=accumulation
            )
            shares.append(plan.batch(update)[where.start : where.stop])
    assert all(len(share) == each for share in shares)
    assert len(set(buckets[np.concatenate(shares)].tolist())) == 1  # one bucket on all ranks
    epoch, position = divmod(update, plans[0].batches_per_epoch)
    assert np.concatenate(shares).tolist() == plans[0].epoch(epoch)[position].tolist()


@st.composite
def cut(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int, int, int]:
    """Bucket and repeats of each sample, epochs of these; samples in a pass, ranks, passes."""
    buckets, repeats, epochs = draw(weighted())
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 3)))
    return (draw(st.permutations(buckets.tolist())), repeats, epochs, *shape)


@given(cut(), st.sampled_from(["pad", "drop"]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_all_ranks_walk_an_epoch_in_step(
    run: tuple[list[int], np.ndarray, int, int, int, int], tail: str, epoch: int
) -> None:
    """What each rank would load, micro-step by micro-step: the same number, of the same bucket;
    together all samples as often as they are due, but for what the tail policy says."""
    listed, repeats, epochs, each, ranks, accumulation = run
    buckets, batch = np.array(listed, dtype=np.int32), each * ranks * accumulation

    def walk(rank: int) -> list[np.ndarray]:
        plan = BatchPlan(buckets, repeats, batch, seed=5, tail=tail, epochs=epochs)  # type: ignore[arg-type]
        loaded = []
        for update in range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch):
            for step in range(accumulation):
                where = micro_batch(
                    batch,
                    micro_step=step,
                    data_rank=rank,
                    data_size=ranks,
                    accumulation=accumulation,
                )
                loaded.append(plan.batch(update)[where.start : where.stop])
        return loaded

    try:
        plan = BatchPlan(buckets, repeats, batch, seed=5, tail=tail, epochs=epochs)  # type: ignore[arg-type]
    except UserError:
        assert tail == "drop"
        return
    walks = [walk(rank) for rank in range(ranks)]
    assert len({len(one) for one in walks}) == 1
    for together in zip(*walks, strict=True):
        assert all(len(rows) == each for rows in together)
        assert len(set(buckets[np.concatenate(together)].tolist())) == 1
    shown = np.bincount(
        np.concatenate([rows for one in walks for rows in one]), minlength=len(buckets)
    )
    again = np.bincount(plan.tail(epoch), minlength=len(buckets))
    due = shown - again if tail == "pad" else shown + again
    for times, count in zip(repeats.tolist(), due.tolist(), strict=True):
        assert floor(Fraction(times, epochs)) <= count <= ceil(Fraction(times, epochs))


def test_readers_on_both_sides_of_an_epochs_end_get_the_same() -> None:
    plan = _plan([13, 8], 3)
    made = [plan.batch(update) for update in range(3 * plan.batches_per_epoch)]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(_plan([13, 8], 3).batch, range(len(made))))
    assert all(np.array_equal(one, other) for one, other in zip(made, parallel, strict=True))


def test_order_of_weights_is_pinned() -> None:
    # Golden, as above: three samples always, four of which each epoch shows half.
    plan = BatchPlan(_buckets([7]), np.array([2, 2, 2, 1, 1, 1, 1]), 5, seed=5, epochs=2)
    expected = [[[6, 5, 2, 0, 1]], [[1, 2, 4, 0, 3]], [[5, 6, 0, 2, 1]]]
    assert [plan.epoch(epoch).tolist() for epoch in (0, 1, 2)] == expected


WALK = """
import os
from datetime import timedelta
import numpy as np
import torch
import torch.distributed as dist
from train.data.batch_plan import BatchPlan, micro_batch
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, ranks = dist.get_rank(), dist.get_world_size()
draw = np.random.default_rng(7)
for run in range(30):
    sizes = draw.integers(0, 24, size=draw.integers(1, 6))
    sizes[0] += 3
    buckets = draw.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    repeats = draw.integers(1, 5, size=len(buckets))
    each, accumulation, epochs = (int(n) for n in draw.integers(1, 4, size=3))
    batch = each * ranks * accumulation
    tail = "drop" if sizes.max() // epochs >= batch else "pad"
    plan = BatchPlan(buckets, repeats, batch, seed=run, tail=tail, epochs=epochs)
    for update in range(plan.batches_per_epoch + 1):
        for step in range(accumulation):
            mine = micro_batch(
                batch, micro_step=step, data_rank=rank, data_size=ranks, accumulation=accumulation
            )
            rows = plan.batch(update)[mine.start : mine.stop]
            bucket = int(buckets[rows[0]])
            shape = torch.full((3 + 5 * bucket, each), float(bucket))  # as activations have
            dist.all_reduce(shape)
            assert bool((shape == bucket * ranks).all()), (run, update, step)
dist.barrier()
print("in step", flush=True)
"""


@pytest.mark.long
def test_three_processes_walk_random_plans_with_collectives_of_each_buckets_shape() -> None:
    """A rank with another bucket, or one more step, would hang or raise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WALK], cwd=Path(__file__).parents[3],
            env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert said == ["in step\n"] * 3
