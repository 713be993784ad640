"""Which share of the samples this process takes, as launchers say it; nobody talks to anybody."""

import os
from dataclasses import dataclass
from functools import cached_property

from shared.errors import UserError

# accelerate and torchrun set the first pair, Slurm the second.
_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of `world` processes that fill a cache together."""

    number: int = 0
    """0 … world−1; also the number of its writer."""
    world: int = 1
    local: int = 0
    """Its number among the processes of this machine."""
    local_world: int = 1

    def owns(self, key: str) -> bool:
        """Whether the clip whose first sample has this key is this process's to encode.

        By content alone: no list is handed out, and another number of processes shares anew.
        """
        return int(key, 16) % self.world == self.number

    def device(self, kind: str) -> str:
        """This process's device of a kind: of several GPUs, the one of its local number."""
        return f"{kind}:{self.local}" if kind == "cuda" and self.world > 1 else kind


def this_rank() -> Rank:
    """The rank that the launcher gave this process. Raises UserError for variables that clash."""
    for rank_name, world_name in _VARIABLES:
        found = os.environ.get(rank_name), os.environ.get(world_name)
        if None in found:
            continue
        try:
            number, world = int(found[0] or ""), int(found[1] or "")
        except ValueError:
            number, world = -1, -1
        if not 0 <= number < world <= 1000:
            raise UserError(
                f"ranks: {rank_name}={found[0]!r}, {world_name}={found[1]!r}; expected "
                f"0 ≤ {rank_name} < {world_name} ≤ 1000. Set both as a launcher does, or neither."
            )
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        local_world = int(
            os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        )
        return Rank(number=number, world=world, local=local, local_world=max(1, local_world))
    return Rank()


class WithRank:
    """A configuration of a command that several processes run together."""

    @cached_property
    def rank(self) -> Rank:
        """This process's share of the work."""
        return this_rank()
