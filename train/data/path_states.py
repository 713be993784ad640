"""Whether shards hold the states of a sampler at the timesteps that a run needs."""

from collections.abc import Sequence
from math import isclose
from shlex import quote

from shared.errors import UserError
from shared.format.fingerprint import state_timesteps
from shared.io.names import quoted
from train.data.dataset import Dataset
from train.functional.schedule import Schedule

_TOLERANCE = 1e-3  # of 1000; a schedule's numbers went through JSON


def refuse_other_states(data: Dataset, schedule: Schedule, option: str) -> None:
    """UserError unless all caches have states at just these steps, which `option` needs."""
    timesteps = schedule.timesteps
    indices = quote(" ".join(f"{index:g}" for index in schedule.indices))
    for part in data.parts:
        store = part.index.store
        found = state_timesteps(part.index.fingerprint)
        if len(found) == len(timesteps) and all(
            isclose(one, other, abs_tol=_TOLERANCE)
            for one, other in zip(found, timesteps, strict=True)
        ):
            continue
        have = f"states at the timesteps {_listed(found)}" if found else "no states of a sampler"
        raise UserError(
            f"{option}: {store} has {have}, expected the run's timesteps {_listed(timesteps)}. "
            f"Make some: wantrain synthesize --states {indices} --flow-shift {schedule.shift:g} "
            f"--shards {quoted(store)} --output <new folder>"
        )


def _listed(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{timestep:.1f}" for timestep in timesteps)
