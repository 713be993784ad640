"""What a run learns, as the loop sees it."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch

from train.data.batches import Batch
from train.functional.schedule import Schedule
from train.methods.step_output import StepOutput
from train.model.roles import Roles
from train.options import Expert, Pairing

Method = Literal["distill", "lora"]
"""`distill`: a few-step student without CFG; `lora`: the base model, finetuned."""


class Objective(Protocol):
    """Which role each update trains, on which loss. Frozen, and no state: updates are counted."""

    @property
    def method(self) -> Method:
        """How it learns, by the command's name; stored in checkpoints and LoRA files."""

    @property
    def expert(self) -> Expert:
        """Whose transformer is the base."""

    @property
    def main_role(self) -> str:
        """The role whose LoRA the run saves; options count its optimizer steps."""

    @property
    def first_noise(self) -> str | None:
        """Stream of the noise that every update begins with, whichever role it trains."""

    @property
    def states(self) -> range | None:
        """Positions of the steps whose states the shards must bring (`Batch.states`)."""

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Role → its rate after the warm-up. These roles exist, in this order."""

    @property
    def cycle(self) -> int:
        """Updates from one of the main role to the next."""

    @property
    def head_start(self) -> int:
        """Updates of other roles before the first cycle."""

    def role_of(self, update: int) -> str:
        """The role that `update` trains."""

    def role_updates(self, role: str, update: int) -> int:
        """How many updates a role has made when `update` begins."""

    def loss(self, roles: Roles, role: str, batch: Batch, negative: torch.Tensor) -> StepOutput:
        """One micro-step of `role`. `negative`: (tokens, D).

        Call `backward` inside the role.
        """

    def teacher_gauges(
        self, roles: Roles, batch: Batch, negative: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Name in `StepOutput.metrics` → (B,) what the teacher has of it; empty: no reference."""

    @property
    def gauge_passes(self) -> int:
        """Passes of the transformer that `teacher_gauges` takes."""

    @property
    def samples_from_latents(self) -> bool:
        """Whether `sample` begins with what a batch has of the cache (latents, noised, or a state),
        not with pure noise."""

    def sample(self, roles: Roles, batch: Batch, negative: torch.Tensor) -> torch.Tensor:
        """What the main role makes of a batch now, (B, C, T, H, W) fp32 without a graph.

        Its noise is of a stream of its own, by `batch.update` and `batch.samples`.
        """

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must match to be resumed."""

    def settings(self) -> dict[str, Any]:
        """What a checkpoint only remembers: it changes nothing but rounding."""

    def sampling(self) -> dict[str, Any]:
        """Fields of `train.saving.provenance.Provenance`: how to sample with the LoRA."""

    def describe(self) -> list[str]:
        """Lines for people, printed at the start and by --dry-run."""

    def describe_length(self, steps: int) -> str:
        """`steps` of the main role in words, with the updates of other roles."""


class OneRole:
    """What an objective has of this where every update trains its main role, without a teacher."""

    main_role: str
    cycle = 1
    head_start = 0
    gauge_passes = 0

    def role_of(self, update: int) -> str:
        return self.main_role

    def role_updates(self, role: str, update: int) -> int:
        return update

    def teacher_gauges(
        self, roles: Roles, batch: Batch, negative: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}

    def describe_length(self, steps: int) -> str:
        return f"{steps} updates"


def few_steps(schedule: Schedule, pairing: Pairing) -> dict[str, Any]:
    """`Objective.sampling` of a student: its own steps, and how one leads to the next."""
    return {
        "method": "distill",
        "denoising_step_indices_list": schedule.indices,
        "flow_shift": schedule.shift,
        "boundary": schedule.boundary,
        "pairing": pairing,
    }
