"""What of the student is matched with the teacher: its clips, or its states where it hands over.

Both noise what the student made, turn velocities into estimates of it, and say what a critic of its
distribution is to learn. All tensors (B, C, T, H, W) fp32.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from train.functional.schedule import add_noise, x0_from_velocity
from train.functional.subinterval import (
    add_noise_to_state,
    state_mean,
    state_velocity,
    state_weight,
)
from train.methods.flow_matching import Level


class Matching(Protocol):
    """Of what a rollout ends with, at a noise level."""

    @property
    def end(self) -> float | None:
        """The noise level where a rollout ends; None: with x̂0."""

    def noised(self, made: torch.Tensor, level: Level) -> torch.Tensor:
        """x_t of what the student made."""

    def estimate(self, x_t: torch.Tensor, v: torch.Tensor, level: Level) -> torch.Tensor:
        """What the student made, as a model sees it whose velocity at x_t is `v`."""

    def target(self, made: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The velocity that a critic is regressed on, and the weight of the squared error."""


@dataclass(frozen=True)
class Clips:
    """DMD: x̂0 is noised to σ, and compared with the models' x̂0."""

    end: None = None

    def noised(self, made: torch.Tensor, level: Level) -> torch.Tensor:
        return add_noise(made, level.noise, level.sigma)

    def estimate(self, x_t: torch.Tensor, v: torch.Tensor, level: Level) -> torch.Tensor:
        return x0_from_velocity(x_t, v, level.sigma)

    def target(self, made: torch.Tensor, level: Level) -> tuple[torch.Tensor, None]:
        return level.noise - made, None


@dataclass(frozen=True)
class HandOver:
    """Phased DMD: the state x_s is noised further, and compared with the models' E[x_s | x_t]."""

    end: float
    """σ_s, where the next expert takes over."""

    def _start(self, level: Level) -> torch.Tensor:
        return self.end * (level.sigma > 0)  # 0 on a frame that is kept clean

    def noised(self, made: torch.Tensor, level: Level) -> torch.Tensor:
        return add_noise_to_state(made, level.noise, self._start(level), level.sigma)

    def estimate(self, x_t: torch.Tensor, v: torch.Tensor, level: Level) -> torch.Tensor:
        x0 = x0_from_velocity(x_t, v, level.sigma)
        return state_mean(x_t, x0, self._start(level), level.sigma)

    def target(self, made: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        start = self._start(level)
        velocity = state_velocity(made, level.noise, start, level.sigma)
        return velocity, state_weight(start, level.sigma)
