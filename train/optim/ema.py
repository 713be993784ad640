"""An exponential moving average of a LoRA, exported in place of the last weights.

Training walks around its optimum; the average over the path lies nearer to it than most of its
points.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Averaged weights, fp32, each on the device of the parameter that it follows."""

    role: str
    """Whose weights they are."""
    weights: Mapping[str, torch.Tensor]
    """Global name → average."""
    decay: float
    """Share of the old average that an update keeps, in (0, 1)."""
    start: int
    """Updates of the role until which the average simply is the trained weights: one that reached
    back to the first of them would drag the untrained LoRA along."""

    @classmethod
    def of(
        cls, role: str, parameters: Mapping[str, torch.Tensor], *, decay: float, start: int
    ) -> "Ema":
        """An average that begins as these weights."""
        copies = {name: value.detach().clone() for name, value in parameters.items()}
        return cls(role=role, weights=copies, decay=decay, start=start)

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take in the weights after the role's update number `updates`, counted from 1."""
        kept = self.decay if updates > self.start else 0.0
        for name, average in self.weights.items():
            average.copy_(kept * average + (1 - kept) * parameters[name])
