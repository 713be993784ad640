"""Which samples make up which batch: a pure function of (samples, seed, epoch).

The unit is the *update batch*: all samples of one optimizer step over all ranks and accumulation
steps, all of one bucket. How it is split into ranks, micro-steps and workers does not change it,
and the position is one integer.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from train.functional.rng import counted_rng
from train.options import Tail

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Circle:
    """Samples of a bucket of which each epoch shows the next few, round and round."""

    members: Rows
    shown: int
    """In each epoch."""

    def window(self, epoch: int) -> Rows:
        at = (epoch * self.shown + np.arange(self.shown)) % len(self.members)
        return self.members[at]


class BatchPlan:
    """The endless sequence of update batches over samples."""

    def __init__(
        self,
        bucket_ids: npt.NDArray[np.int32],
        repeats: npt.NDArray[np.int64],
        batch_size: int,
        *,
        seed: int,
        tail: Tail = "pad",
        epochs: int = 1,
    ) -> None:
        """Plan over samples, which are numbered as they come.

        Args:
            bucket_ids: (N,) bucket of each sample.
            repeats: (N,) how often it is shown in `epochs` epochs. Of what does not go into them
                evenly each epoch shows its share, rounded up to whole samples of a bucket: a
                sample of 3 in 2 epochs is shown once or twice in each. So an epoch always has the
                same length.
            batch_size: samples of one update over all ranks and accumulation steps.
            tail: a bucket's last batch is filled with its samples again, or left out.

        Raises UserError where no batch can be made.
        """
        self.batch_size = batch_size
        self.seed = seed
        self.tail_policy: Tail = tail
        always, rest = np.divmod(repeats, epochs)
        samples = np.repeat(np.arange(len(bucket_ids)), always)
        sizes = np.bincount(bucket_ids[samples], minlength=int(bucket_ids.max(initial=0)) + 1)
        by_bucket = samples[np.argsort(bucket_ids[samples], kind="stable")]
        self._always = np.split(by_bucket, np.cumsum(sizes)[:-1])
        self._circles = [self._circles_of(b, bucket_ids, rest, epochs) for b in range(len(sizes))]
        sizes += [sum(circle.shown for circle in circles) for circles in self._circles]
        short = sizes % batch_size
        whole = sizes // batch_size
        padded = tail == "pad"
        self.batches_per_epoch = int((whole + (short > 0) if padded else whole).sum())
        self.tail_samples = int((batch_size - short)[short > 0].sum() if padded else short.sum())
        """Samples that an epoch shows again (`pad`) or leaves out (`drop`)."""
        if self.batches_per_epoch == 0:
            raise UserError(
                f"shards: no full batch of {batch_size} in any bucket (bucket sizes "
                f"{sizes[sizes > 0].tolist()}); use --tail pad, a smaller --train-batch-size, "
                "or more data."
            )
        self._lock = threading.Lock()
        self._epochs: dict[int, Rows] = {}

    def _circles_of(
        self, bucket: int, bucket_ids: npt.NDArray[np.int32], rest: Rows, epochs: int
    ) -> list[_Circle]:
        """What of a bucket occurs in some epochs only, by how often."""
        if epochs == 1:
            return []
        mine = np.flatnonzero((bucket_ids == bucket) & (rest > 0))
        return [
            _Circle(
                counted_rng(self.seed, "circle", bucket, int(times)).permutation(
                    members := mine[rest[mine] == times]
                ),
                -(-len(members) * int(times) // epochs),
            )
            for times in np.unique(rest[mine])
        ]

    def _orders(self, epoch: int) -> Iterator[tuple[Rows, Rows]]:
        """Of each bucket the samples of its batches in the epoch's order, and those of them that
        fill up the last one (`pad`), or the samples that are left out (`drop`)."""
        for bucket, always in enumerate(self._always):
            now = [always, *(circle.window(epoch) for circle in self._circles[bucket])]
            rng = counted_rng(self.seed, "order", epoch, bucket)
            order = rng.permutation(np.concatenate(now))
            short = len(order) % self.batch_size
            if self.tail_policy == "drop":
                yield order[: len(order) - short], order[len(order) - short :]
            else:
                filled = np.resize(order, len(order) + (self.batch_size - short) * (short > 0))
                yield filled, filled[len(order) :]

    def epoch(self, epoch: int) -> Rows:
        """(batches, batch_size) samples, in training order."""
        shown = np.concatenate([order for order, _ in self._orders(epoch)])
        batches = shown.reshape(-1, self.batch_size)
        return batches[counted_rng(self.seed, "batches", epoch).permutation(len(batches))]

    def tail(self, epoch: int) -> Rows:
        """The samples that an epoch shows once more than it would (`pad`) or leaves out."""
        return np.concatenate([tail for _, tail in self._orders(epoch)])

    def batch(self, update: int) -> Rows:
        """(batch_size,) samples of update number `update`, counted from the start of the run."""
        epoch, position = divmod(update, self.batches_per_epoch)
        with self._lock:  # at an epoch's end readers are on both sides of it
            if epoch not in self._epochs:
                self._epochs = {n: rows for n, rows in self._epochs.items() if n == epoch - 1}
                self._epochs[epoch] = self.epoch(epoch)
            return self._epochs[epoch][position]


def micro_batch(
    batch_size: int, *, micro_step: int, data_rank: int, data_size: int, accumulation: int
) -> range:
    """Positions inside an update batch that one data rank computes in one micro-step."""
    per_step = batch_size // (data_size * accumulation)
    assert per_step * data_size * accumulation == batch_size
    start = (micro_step * data_size + data_rank) * per_step
    return range(start, start + per_step)
