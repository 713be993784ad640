"""The noise that an update begins with comes with its batch: else the device would wait for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.cli.config_command import configuration
from tests.train.conftest import randomise_lora
from train.cli.app import app as wantrain
from train.data.batches import load_prompt_bank
from train.loop import micro_batches
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import Roles
from train.prepare import prepare_distillation, prepare_finetuning

CPU = torch.device("cpu")


class Asked(dict[tuple[int, str], torch.Tensor]):
    """What was drawn ahead, and which streams were asked for."""

    def __init__(self, drawn: Any) -> None:
        super().__init__(drawn)
        self.streams: list[tuple[int, str]] = []

    def get(self, stream: Any, default: Any = None) -> Any:
        self.streams.append(stream)
        return super().get(stream, default)


@pytest.mark.parametrize("words", [("distill",), ("distill", "--start", "noise"), ("lora",)])
def test_of_every_role(tiny_t2v: Path, t2v_shards: Path, words: tuple[str, ...]) -> None:
    prepare = prepare_finetuning if words == ("lora",) else prepare_distillation
    common = ("--model", str(tiny_t2v), "--shards", str(t2v_shards), "--device", "cpu")
    run = prepare(configuration(wantrain, [*words, *common]))  # type: ignore[arg-type]
    base = load_base(run.spec, "low", precision="no", device=CPU, gradient_checkpointing=False)
    lora = LoraSpec(rank=2, alpha=3, targets=select_targets(base, ("q",)))
    roles = Roles(base, lora, seed=7, names=run.objective.learning_rates)
    bank = load_prompt_bank(run.data.first, run.spec.family)
    for role in run.objective.learning_rates:
        randomise_lora(roles.parameters(role), 1)
    for update in range(run.cycle - 2, run.cycle):
        batch = micro_batches(run, bank).load(max(update, 0), 0).to(CPU)
        (first,) = batch.drawn
        asked, role = Asked(batch.drawn), run.objective.role_of(batch.update)
        losses = [
            run.objective.loss(roles, role, replace(batch, drawn=drawn), bank.negative).loss
            for drawn in (asked, {})
        ]
        assert asked.streams[0] == first and asked.streams.count(first) == 1
        assert torch.equal(*losses)
