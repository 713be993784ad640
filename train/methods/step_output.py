"""What one micro-step of a role gives: its loss, noise levels and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """One micro-step of a role.

    All tensors lie on the device; `numbers` fetches them in one transfer.
    """

    loss: torch.Tensor
    """Scalar, with a graph until its backward pass."""
    u: torch.Tensor
    """(B,) noise levels before the shift, in [0, 1]."""
    sigma: torch.Tensor
    """(B,) the same levels after it: the share of noise."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name in trackers → scalar without a graph."""
    ratios: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Name in trackers → the two metrics whose quotient it is, averaged over micro-steps first."""

    def numbers(self) -> "StepNumbers":
        """On the CPU. Waits for the device once."""
        parts = [self.loss.reshape(1), *(value.reshape(1) for value in self.metrics.values())]
        fetched = torch.cat([*parts, self.u, self.sigma]).detach().float().tolist()
        scalars, levels = fetched[: len(parts)], fetched[len(parts) :]
        return StepNumbers(
            loss=scalars[0],
            metrics=dict(zip(self.metrics, scalars[1:], strict=True)),
            ratios=self.ratios,
            u=tuple(levels[: len(self.u)]),
            sigma=tuple(levels[len(self.u) :]),
        )


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """`StepOutput` as numbers on the CPU."""

    loss: float
    metrics: Mapping[str, float]
    ratios: Mapping[str, tuple[str, str]]
    u: tuple[float, ...]
    sigma: tuple[float, ...]

    def named(self) -> dict[str, float]:
        """Metrics and ratios, as trackers show them."""
        ratios = {
            name: self.metrics[above] / self.metrics[below]
            for name, (above, below) in self.ratios.items()
            if self.metrics[below]
        }
        return {**self.metrics, **ratios}


def together(steps: list[StepNumbers]) -> StepNumbers:
    """All parts of one update: losses added up (each is its share), metrics averaged."""
    names = steps[0].metrics
    return StepNumbers(
        loss=sum(step.loss for step in steps),
        metrics={name: sum(step.metrics[name] for step in steps) / len(steps) for name in names},
        ratios=steps[0].ratios,
        u=tuple(level for step in steps for level in step.u),
        sigma=tuple(level for step in steps for level in step.sigma),
    )
