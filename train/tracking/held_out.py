"""The loss on what `--holdout` keeps from training: fixed samples, noise and levels.

So that it differs between two steps, or two runs, by the weights alone. It falls while what is
learned holds for other clips, too, and rises where a LoRA learns its own by heart.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.io.durable import write_bytes
from shared.io.memo import recall
from shared.spread import spread_over
from train.data.batches import MicroBatches
from train.distributed.process_group import Ranks
from train.functional.rng import counted_rng
from train.methods.finetune import Finetuning
from train.model.roles import Roles
from train.tracking.trackers import Tracker

RECORD = "holdout.jsonl"
TAG = "loss/held_out"
MOST_SAMPLES, LEAST_LOSSES = 64, 16


def losses_of(output: Path) -> list[tuple[int, float]]:
    """(optimizer steps, loss) that a run has measured, the last one last."""
    return [(r["step"], r["loss"]) for r in recall(output / RECORD) if "step" in r]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is measured, how often, and where it is written."""

    objective: Finetuning
    batches: MicroBatches
    """Over the samples that are held out."""
    every: int
    """Optimizer steps."""
    record: Path
    ranks: Ranks

    @property
    def rows(self) -> list[int]:
        """All samples, or `MOST_SAMPLES` spread over them."""
        return list(map(int, spread_over(len(self.batches.dataset), MOST_SAMPLES)))

    @property
    def losses(self) -> int:
        """Of one measurement: `LEAST_LOSSES` or more, each sample at as many levels as others."""
        rows = len(self.rows)
        return rows * -(-LEAST_LOSSES // rows)

    def describe(self) -> list[str]:
        """Lines for people."""
        rows, number = len(self.rows), len(self.batches.dataset)
        of_all = "" if rows == number else f" of {number}"
        return [
            f"held out loss on {rows}{of_all} samples, {self.losses // rows} noise level(s) each, "
            f"every {self.every} updates, in {self.record}"
        ]

    def begin(self, step: int) -> None:
        """Forget what was measured after `step`, where the run goes on; at 0 everything."""
        kept = [r for r in self._records() if r["step"] <= step and step > 0]
        if self.ranks.first and self.record.exists():
            self._write(kept)

    def due(self, step: int) -> bool:
        """Whether `step` is to be measured: a kill may have come before. All processes call it."""
        if step % self.every:
            return False
        return self.ranks.first_does(lambda: all(r["step"] != step for r in self._records()))

    def measure(
        self,
        roles: Roles,
        trackers: Sequence[Tracker],
        *,
        step: int,
        device: torch.device,
        stopped: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """The mean loss with the weights as they are; None where it was `stopped` (asked before
        each pass).

        All processes call it: each takes its share of the passes, and as many as the others.
        """
        mesh = self.ranks.mesh
        mine = []
        for first in range(0, self.losses, mesh.data):
            if stopped():
                return None
            one = (first + mesh.data_rank(self.ranks.rank)) % self.losses
            mine.append((one, self._loss(roles, one, device)))
        found = dict(pair for of_one in self.ranks.gathered(mine) for pair in of_one)
        loss = math.fsum(found.values()) / self.losses
        if self.ranks.first:
            self._write([*self._records(), {"step": step, "loss": loss}])
            for tracker in trackers:
                tracker.log({TAG: loss}, step)
        return loss

    def _loss(self, roles: Roles, one: int, device: torch.device) -> float:
        """Number `one` of `losses`: levels are spread evenly over all of them."""
        rows = self.rows
        place = int(counted_rng(0, "held out").permutation(self.losses)[one])
        batch, _ = self.batches.whole_sample(rows[one % len(rows)], one)
        quantile = (place + 0.5) / self.losses
        return float(self.objective.held_out_loss(roles, batch.to(device), quantile))

    def _records(self) -> list[dict[str, float]]:
        return [record for record in recall(self.record) if "step" in record]

    def _write(self, records: Sequence[dict[str, float]]) -> None:
        write_bytes(self.record, "".join(json.dumps(r) + "\n" for r in records).encode())
