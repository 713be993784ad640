"""What a step lets a watcher see beside its loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One micro-step of a role: its loss, and what is worth seeing of how it came about.

    Everything lies on the device; whoever wants numbers fetches all in one transfer (`numbers`).
    """

    loss: torch.Tensor
    """Scalar with a graph."""
    u: torch.Tensor
    """(B,) noise levels before the shift, in [0, 1]."""
    sigma: torch.Tensor
    """(B,) the same levels after it: the share of noise."""
    figures: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name → scalar without a graph."""

    def numbers(self) -> "Numbers":
        """On the CPU. Waits for the device once."""
        parts = [self.loss.reshape(1), *(value.reshape(1) for value in self.figures.values())]
        fetched = torch.cat([*parts, self.u, self.sigma]).detach().float().tolist()
        scalars, levels = fetched[: len(parts)], fetched[len(parts) :]
        return Numbers(
            loss=scalars[0],
            figures=dict(zip(self.figures, scalars[1:], strict=True)),
            u=tuple(levels[: len(self.u)]),
            sigma=tuple(levels[len(self.u) :]),
        )


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """`Watched`, as numbers."""

    loss: float
    figures: Mapping[str, float]
    u: tuple[float, ...]
    sigma: tuple[float, ...]


def together(steps: list[Numbers]) -> Numbers:
    """All parts of one update: losses added up (each is its share), figures averaged."""
    names = steps[0].figures
    return Numbers(
        loss=sum(step.loss for step in steps),
        figures={name: sum(step.figures[name] for step in steps) / len(steps) for name in names},
        u=tuple(level for step in steps for level in step.u),
        sigma=tuple(level for step in steps for level in step.sigma),
    )
