"""Gauges: is the student still with its teacher? Contrast, motion and variety as ratios to it.

Contrast and motion come from the rollouts of every update (`train.methods.gauges`), as running
means over the teacher's, measured once; variety comes from validation, over that of the first one.
All of it is in a JSON object, the `TrainState.record`, which checkpoints keep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from train.data.batches import MicroBatches
from train.distributed.process_group import Ranks
from train.methods.base import Objective
from train.methods.gauges import CONTRAST, MOTION
from train.model.roles import Roles

VARIETY = "variety"
RECENT = 0.1
"""Weight of an update in the running mean of its exit; the first ones count alike."""
ENOUGH = 4
"""Updates with an exit before its mean is looked at."""
BANDS = {CONTRAST: (0.9, 1.1), MOTION: (0.9, 1.2), VARIETY: (0.9, math.inf)}
AS_GOOD = math.log(1.02)
"""Ratios nearer to 1 than this are equally good."""
_CURES = {
    (CONTRAST, "above"): "clips oversaturate: lower or calibrate --real-guidance-scale, lower the "
    "learning rates, or stop earlier (--keep-best contrast)",
    (CONTRAST, "below"): "clips are washed out: train longer, raise --real-guidance-scale, or let "
    "the critic keep up (--gen-update-interval, --learning-rate-critic)",
    (MOTION, "above"): "clips jitter: lower or calibrate --real-guidance-scale, lower the learning "
    "rates, or stop earlier (--keep-best motion)",
    (MOTION, "below"): "clips slow down: lower the learning rates or stop earlier (--keep-best "
    "motion), lower or calibrate --real-guidance-scale, or train on clips that move more (--where)",
    (VARIETY, "below"): "clips of a prompt look alike: lower or calibrate --real-guidance-scale, "
    "lower the learning rates, or stop earlier (--keep-best variety)",
}


@dataclass(frozen=True)
class Reading:
    """A gauge now: a ratio, 1 is the teacher's, and the standard error of it."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" + (f" ± {self.error:.2f}" if self.error else "")


class Gauges:
    """Reads, warns, and knows the best so far. Its state is the record that it is given."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self._new: list[str] = []

    @property
    def has_reference(self) -> bool:
        return bool(self._record.get("reference"))

    def refer_to(self, samples: Mapping[str, Sequence[float]]) -> None:
        """Take what the teacher has, by `measures_of`'s names in the order of the steps."""
        self._record["reference"] = {
            name: [fmean(values), stdev(values) / math.sqrt(len(values))]
            for name, values in samples.items()
        }

    def describe(self) -> list[str]:
        """Lines for people: the reference."""
        reference: dict[str, list[float]] = self._record.get("reference", {})
        lines = []
        for gauge in (CONTRAST, MOTION):
            shown = [
                f"{mean:.3f} ± {error:.3f} at t {name.rsplit('@')[-1]}"
                for name, (mean, error) in reference.items()
                if f"/{gauge}@" in name
            ]
            if shown:
                lines.append(f"gauges   the teacher's {gauge}: {', '.join(shown)}")
        return lines

    def add(self, metrics: Mapping[str, float], *, share: float) -> dict[str, float]:
        """Count an update's metrics; what trackers show of the gauges.

        `share`: of the run's updates that are done.
        """
        reference = self._record.get("reference", {})
        running = self._record.setdefault("running", {}) if reference else {}
        shown = {}
        for name in (name for name in metrics if name in reference):
            number, mean, square = running.get(name, (0, 0.0, 0.0))
            weight = max(RECENT, 1 / (number + 1))
            running[name] = [
                number + 1,
                mean + weight * (metrics[name] - mean),
                square + weight * (metrics[name] ** 2 - square),
            ]
            if (reading := self._at(name)) is not None:
                shown[name.replace("latent/", "gauge/")] = reading.value
        for gauge in (CONTRAST, MOTION):
            if (reading := self.reading(gauge)) is not None:
                self._look(gauge, reading, share)
        return shown | {f"gauge/{gauge}": one.value for gauge, one in self.readings().items()}

    def add_variety(self, distance: float, clips: int, *, updates: int, share: float) -> None:
        """Count a validation: mean distance between clips of one prompt, after `updates`.

        The one before the first update is what later ones are compared with.
        """
        base = self._record.get("variety", {}).get("base")
        if updates == 0:
            base = [distance, clips]
        if base is None or base[1] != clips or not base[0]:  # nothing to compare with
            self._record["variety"] = {"updates": updates, "base": base}
            return
        value = distance / base[0]
        self._record["variety"] = {"updates": updates, "base": base, "value": value}
        if updates:
            self._look(VARIETY, Reading(value, 0.0), share)

    @property
    def validated(self) -> int | None:
        """Updates before the last validation that told of variety."""
        updates: int | None = self._record.get("variety", {}).get("updates")
        return updates

    def reading(self, gauge: str) -> Reading | None:
        """Of contrast and motion at the last of the steps; None where too little is known."""
        if gauge == VARIETY:
            value = self._record.get("variety", {}).get("value")
            return None if value is None else Reading(value, 0.0)
        names = [name for name in self._record.get("reference", {}) if f"/{gauge}@" in name]
        return self._at(names[-1]) if names else None

    def readings(self) -> dict[str, Reading]:
        """All that are known."""
        found = {gauge: self.reading(gauge) for gauge in BANDS}
        return {gauge: reading for gauge, reading in found.items() if reading is not None}

    def summary(self) -> dict[str, float] | None:
        """For a LoRA's metadata; None where nothing is known."""
        readings = self.readings()
        values = {gauge: round(one.value, 4) for gauge, one in readings.items()}
        errors = {f"{gauge}_error": round(one.error, 4) for gauge, one in readings.items()}
        return (values | {name: error for name, error in errors.items() if error}) or None

    def _at(self, name: str) -> Reading | None:
        number, mean, square = self._record.get("running", {}).get(name, (0, 0.0, 0.0))
        if number < ENOUGH:
            return None
        reference, reference_error = self._record["reference"][name]
        counted = min(number, 2 / RECENT - 1)  # the samples that such a mean is worth
        error = math.sqrt(max(square - mean**2, 0.0) / (counted - 1))
        value = mean / reference
        return Reading(value, value * math.hypot(error / mean, reference_error / reference))

    def _look(self, gauge: str, reading: Reading, share: float) -> None:
        """Note a warning where a gauge has left its band by more than its error.

        A student begins below its guided teacher: low counts once it was inside, or half-way.
        """
        low, high = BANDS[gauge]
        sides = self._record.setdefault("sides", {})
        before = sides.get(gauge)
        if reading.value - reading.error > high:
            side = "above"
        elif reading.value + reading.error < low and (before or share >= 0.5):
            side = "below"
        elif low <= reading.value <= high:
            side = "inside"
        else:
            return
        sides[gauge] = side
        if side not in (before, "inside"):
            limit = high if side == "above" else low
            whose = "the base's" if gauge == VARIETY else "the teacher's at the last step"
            self._new.append(
                f"{gauge} is {reading} of {whose}, {side} {limit:g}: {_CURES[gauge, side]}; "
                "see docs/watch.md"
            )

    def warnings(self) -> list[str]:
        """What is new since the last call, one line for each crossing."""
        new, self._new = self._new, []
        return new

    def is_best(self, gauge: str, updates: int) -> bool:
        """Whether the state after `updates` is the best so far; if so, remember it."""
        reading = self.reading(gauge)
        if reading is None or (gauge == VARIETY and self.validated != updates):
            return False
        distance = max(abs(math.log(reading.value)), AS_GOOD)
        best = self._record.get("best", {})
        if best.get("gauge") == gauge and best["distance"] < distance:
            return False
        self._record["best"] = {"gauge": gauge, "distance": distance, "updates": updates}
        return True


def teacher_samples(
    objective: Objective,
    roles: Roles,
    batches: MicroBatches,
    negative: torch.Tensor,
    ranks: Ranks,
    *,
    number: int,
) -> dict[str, list[float]]:
    """Name → what each sample of the run's first `number` batches has of the teacher.

    All processes call it together; each has its own batches, and all get the whole.
    """
    measured = [
        objective.teacher_gauges(roles, batches.load(update, 0).to(negative.device), negative)
        for update in range(number)
    ]
    own: dict[str, list[float]] = {}
    for one in measured:
        if one:  # one transfer a batch
            rows = torch.stack(list(one.values())).tolist()
            for name, row in zip(one, rows, strict=True):
                own.setdefault(name, []).extend(row)
    together: dict[str, list[float]] = {}
    for of_one in ranks.gathered(own):
        for name, values in of_one.items():
            together.setdefault(name, []).extend(values)
    return together
