"""How the processes of a run share its work, in sizes with names.

Not torch's DeviceMesh: a plan and a dry run need the sizes where there are no processes yet.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """`data` groups of `context` processes each, neighbours by their rank."""

    data: int = 1
    """Groups that compute different samples; gradients are averaged over them."""
    context: int = 1
    """Processes that share the tokens of one sample. Nothing does so yet."""

    def __post_init__(self) -> None:
        assert self.context == 1, f"context {self.context}: samples are not split among processes"

    def data_rank(self, rank: int) -> int:
        """The group of a process."""
        return rank // self.context
