"""How base, gradients and optimizers are spread over processes, as the loop sees it.

A strategy owns all that depends on it; what is learned does not. Weights and optimizer state leave
it whole and under global names, so that files are the same whichever made them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class TrainedRole(Protocol):
    """One role's LoRA and its optimizer."""

    def update(self, rate: float, max_norm: float) -> float:
        """One optimizer step with the gradients of all processes, clipped; their norm before.

        Gradients are then gone. Where the norm is not finite no weight and no moment has changed.
        """

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Global name → whole tensor, fp32. All processes call it together."""

    def moments(self) -> Mapping[str, torch.Tensor]:
        """ "name/moment" → what the optimizer holds, whole; empty before the first update.

        All processes call it together.
        """

    def load(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
    ) -> None:
        """Put back what `weights` and `moments` gave, in every process."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Roles that train, however they are spread."""

    trained: Mapping[str, TrainedRole]
    """In the order of the objective."""
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    """Adds the gradients of one micro-step's loss. Call it inside the role."""
    notes: tuple[str, ...] = ()
    """Lines about its set-up, to print."""
