"""Which samples make up which batch: a pure function of (index, seed, epoch).

The unit is the *update batch*: all samples of one optimizer step over all ranks and accumulation
steps, all of one bucket. How it is cut among ranks, micro-steps and workers does not change it, and
the position is one integer.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from train.rng import counted_rng

Tail = Literal["pad", "drop"]


class BatchPlan:
    """The endless sequence of update batches over a cache."""

    def __init__(
        self,
        bucket_ids: npt.NDArray[np.int32],
        repeats: npt.NDArray[np.int64],
        batch_size: int,
        *,
        seed: int,
        tail: Tail = "pad",
    ) -> None:
        """Plan over rows of the index.

        Args:
            bucket_ids: (N,) bucket of each row.
            repeats: (N,) how often a row occurs in an epoch (`video_repeat`).
            batch_size: samples of one update over all ranks and accumulation steps.
            tail: a bucket's last batch is filled with its samples again, or left out.

        Raises UserError where no batch can be made.
        """
        self.batch_size = batch_size
        self.seed = seed
        self._tail = tail
        rows = np.repeat(np.arange(len(bucket_ids)), repeats)
        by_bucket = rows[np.argsort(bucket_ids[rows], kind="stable")]
        sizes = np.bincount(bucket_ids[rows], minlength=1)
        self._buckets = np.split(by_bucket, np.cumsum(sizes)[:-1])
        rest = sizes % batch_size
        whole = sizes // batch_size
        padded = tail == "pad"
        self.batches_per_epoch = int((whole + (rest > 0) if padded else whole).sum())
        self.tail_samples = int((batch_size - rest)[rest > 0].sum() if padded else rest.sum())
        """Samples that an epoch shows again (`pad`) or leaves out (`drop`)."""
        if self.batches_per_epoch == 0:
            raise UserError(
                f"shards: no full batch of {batch_size} in any bucket (bucket sizes "
                f"{sizes[sizes > 0].tolist()}); use --tail pad, a smaller --train-batch-size, "
                "or more data."
            )
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """(batches, batch_size) rows of the index, in training order."""
        batches = []
        for bucket, members in enumerate(self._buckets):
            order = counted_rng(self.seed, "order", epoch, bucket).permutation(members)
            whole = len(order) // self.batch_size
            if self._tail == "pad" and len(order) % self.batch_size:
                order = np.resize(order, (whole + 1) * self.batch_size)
            else:
                order = order[: whole * self.batch_size]
            batches.append(order.reshape(-1, self.batch_size))
        together = np.concatenate(batches)
        return together[counted_rng(self.seed, "batches", epoch).permutation(len(together))]

    def batch(self, update: int) -> npt.NDArray[np.int64]:
        """(batch_size,) rows of update number `update`, counted from the start of the run."""
        epoch, position = divmod(update, self.batches_per_epoch)
        current = self._epoch
        if current is None or current[0] != epoch:
            current = (epoch, self.epoch(epoch))
            self._epoch = current  # readers on both sides of an epoch's end may make it twice
        return current[1][position]


def micro_batch(
    batch_size: int, *, micro_step: int, rank: int, world_size: int, accumulation: int
) -> range:
    """Positions inside an update batch that one rank computes in one micro-step."""
    per_step = batch_size // (world_size * accumulation)
    assert per_step * world_size * accumulation == batch_size
    start = (micro_step * world_size + rank) * per_step
    return range(start, start + per_step)
