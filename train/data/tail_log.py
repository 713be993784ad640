"""`tail.jsonl` of a run: which samples each epoch shows again, or leaves out, to fill batches."""

import json
from pathlib import Path

from shared.io.durable import write_bytes
from shared.io.memo import note, recall
from train.data.batch_plan import BatchPlan
from train.data.dataset import Dataset

TAIL_LOG = "tail.jsonl"


class TailLog:
    """A line for each epoch that begins; none where every batch is full by itself."""

    def __init__(self, folder: Path, data: Dataset, plan: BatchPlan, *, start: int) -> None:
        """`start`: the first update. Lines of its epoch and of later ones, from a run that was
        interrupted, are written anew."""
        self._path = folder / TAIL_LOG
        self._data, self._plan = data, plan
        self._epoch = start // plan.batches_per_epoch - 1
        earlier = [r for r in recall(self._path) if r.get("epoch", -1) <= self._epoch]
        if self._path.exists():
            write_bytes(self._path, "".join(json.dumps(r) + "\n" for r in earlier).encode())

    def begin(self, update: int) -> None:
        """Call before each update."""
        epoch = update // self._plan.batches_per_epoch
        if epoch == self._epoch or not self._plan.tail_samples:
            return
        self._epoch = epoch
        keys = [self._data.key(int(sample)) for sample in self._plan.tail(epoch)]
        note(self._path, [{"epoch": epoch, "tail": self._plan.tail_policy, "keys": keys}])
