"""Which samples make up which batch: a pure function of (index, seed, epoch).

The unit is the *update batch*: all samples of one optimizer step over all ranks and accumulation
steps, all of one bucket. How it is cut among ranks, micro-steps and workers does not change it, and
the position is one integer.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from train.rng import counted_rng

Tail = Literal["pad", "drop"]


@dataclass(frozen=True)
class BatchPlan:
    """The endless sequence of update batches over a cache."""

    bucket_ids: npt.NDArray[np.int32]
    """(N,) bucket of each row of the index."""
    repeats: npt.NDArray[np.int64]
    """(N,) how often a row occurs in an epoch (`video_repeat`)."""
    batch_size: int
    """Samples of one update over all ranks and accumulation steps."""
    seed: int
    tail: Tail = "pad"
    """A bucket's last batch is filled with its samples again, or left out."""

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            sizes = self._bucket_sizes()
            raise UserError(
                f"shards: no full batch of {self.batch_size} in any bucket (bucket sizes "
                f"{sizes[sizes > 0].tolist()}); use --tail pad, a smaller --train-batch-size, "
                "or more data."
            )

    def _bucket_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each bucket, repeats counted."""
        return np.bincount(self.bucket_ids, weights=self.repeats, minlength=1).astype(np.int64)

    @property
    def batches_per_epoch(self) -> int:
        sizes = self._bucket_sizes()
        whole = sizes // self.batch_size
        return int((-(-sizes // self.batch_size) if self.tail == "pad" else whole).sum())

    @property
    def tail_samples(self) -> int:
        """Samples that an epoch shows again (`pad`) or leaves out (`drop`)."""
        rest = self._bucket_sizes() % self.batch_size
        return int((self.batch_size - rest)[rest > 0].sum() if self.tail == "pad" else rest.sum())

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """(batches, batch_size) rows of the index, in training order."""
        rows = np.repeat(np.arange(len(self.bucket_ids)), self.repeats)
        buckets = self.bucket_ids[rows]
        batches = []
        for bucket in np.unique(buckets):
            members = rows[buckets == bucket]
            order = counted_rng(self.seed, "order", epoch, int(bucket)).permutation(members)
            if self.tail == "pad":
                count = -(-len(order) // self.batch_size)
                order = np.resize(order, count * self.batch_size)
            else:
                order = order[: len(order) // self.batch_size * self.batch_size]
            batches.append(order.reshape(-1, self.batch_size))
        together = np.concatenate(batches)
        return together[counted_rng(self.seed, "batches", epoch).permutation(len(together))]

    def batch(self, update: int) -> npt.NDArray[np.int64]:
        """(batch_size,) rows of update number `update`, counted from the start of the run."""
        epoch, position = divmod(update, self.batches_per_epoch)
        return _cached_epoch(self, epoch)[position]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@lru_cache(maxsize=2)
def _cached_epoch(plan: BatchPlan, epoch: int) -> npt.NDArray[np.int64]:
    return plan.epoch(epoch)


def micro_batch(
    batch_size: int, *, micro_step: int, rank: int, world_size: int, accumulation: int
) -> range:
    """Positions inside an update batch that one rank computes in one micro-step."""
    per_step = batch_size // (world_size * accumulation)
    assert per_step * world_size * accumulation == batch_size
    start = (micro_step * world_size + rank) * per_step
    return range(start, start + per_step)
