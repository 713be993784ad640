"""FLOPs of updates, counted by torch while a run's own maths works on tensors without values.

`torch.utils.flop_counter` counts matrix products, convolutions and attention as they are
dispatched, a multiplication and an addition as two. What autograd does backwards is counted as it
does it: of a frozen linear layer only the gradient of its input, of a LoRA also those of its
weights; of attention four products for the two forward. Nothing is checkpointed here, so what
checkpointing computes again is not counted, as model FLOPs are defined (PaLM, arXiv:2204.02311,
appendix B). Norms, activations and optimizers, less than a hundredth, are not counted either.
"""

from collections.abc import Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.data.batches import MicroBatches, PromptBank
from train.model.base import component_of
from train.model.custom_weights import component_config
from train.model.roles import Roles
from train.run import Run
from train.session import lora_of

# Dense bf16, FLOP/s, by the name that CUDA gives the card; from NVIDIA's datasheets, where those of
# Hopper say twice that, for sparse matrices.
_BF16_PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,  # SXM
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def bf16_peak(device_name: str) -> float | None:
    """FLOP/s of a card's matrix units in bf16; None of one that is not known here."""
    return _BF16_PEAKS.get(device_name)


def count(
    run: Run, batches: MicroBatches, bank: PromptBank, updates: Iterable[int]
) -> dict[int, int]:
    """Update → model FLOPs of this process, forward and backward.

    Reads the batches, whose shapes decide; takes no memory for weights. Raises UserError where a
    batch can't be read.
    """
    meta, config, objective = torch.device("meta"), run.config, run.objective
    component = component_of(objective.expert)
    facts = component_config(run.spec, component)
    with meta:
        transformer = run.spec.family.load_class(component).from_config(facts)
        lora = lora_of(config, transformer)
        roles = Roles(transformer, lora, seed=config.seed, names=objective.learning_rates)
    negative = bank.negative.to(meta)
    counted = {}
    for update in updates:
        role = objective.role_of(update)
        with FlopCounterMode(display=False) as counter:
            for micro_step in range(config.gradient_accumulation_steps):
                batch = batches.load(update, micro_step).to(meta)
                step = objective.loss(roles, role, batch, negative)
                with roles.role(role):
                    step.loss.backward()
        counted[update] = counter.get_total_flops()
    return counted
