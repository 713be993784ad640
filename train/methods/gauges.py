"""Gauges: contrast and motion of x̂0 where a rollout ends, the student's beside its teacher's.

The student's cost no pass: every update of either role has a rollout. x̂0 is compared with the
teacher's at the same step, since that of an early step is blurred, and at the last one with its
clips (`train.methods.teacher_gauges`). That is measured once, on other samples, so only means over
many can be compared.
"""

import torch

from train.data.batches import Batch
from train.functional.contrast import contrast, motion

CONTRAST, MOTION = "contrast", "motion"


def gauge_name(gauge: str, timestep: float) -> str:
    """In `StepOutput.metrics`, of x̂0 at a step of this timestep."""
    return f"latent/{gauge}@{timestep:.0f}"


def measures_of(x0: torch.Tensor, batch: Batch, timestep: float) -> dict[str, torch.Tensor]:
    """Name → (B,) contrast and, of clips, motion of x̂0 (B, C, T, H, W), without a graph.

    Frames that a sample is given (its first, for i2v and ti2v) are the data's, and left out.
    """
    x0, generated = x0.detach(), _generated(batch)
    measured = {gauge_name(CONTRAST, timestep): contrast(x0, generated)}
    if x0.shape[2] > (1 if generated is None else 2):
        measured[gauge_name(MOTION, timestep)] = motion(x0, generated)
    return measured


def _generated(batch: Batch) -> torch.Tensor | None:
    """(B, 1, T, 1, 1): 1 on latent frames that a model makes, 0 on given ones; None: all 1."""
    if batch.condition is not None:  # its first channel is the mask of given frames
        return (batch.condition[:, :1, :, :1, :1] < 0.5).float()
    return batch.noised
