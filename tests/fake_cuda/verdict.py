"""What is wrong with what a case shows."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fake_cuda.cases import OPTIONS, Case, Found

TABLE = Path(__file__).with_name("table.json")
"""Numbers of each case's steps; `python -m tests.fake_cuda --write` makes it."""
TOLERANCE = 0.05

# "operator at site" → (most times in an update, why it may wait).
WAITS = {
    "_local_scalar_dense at step_output:StepOutput.numbers": (
        6,
        "the loss decides whether weights may change. One transfer: only fakes fetch number by "
        "number, a loss, a level before and after the shift, two metrics",
    ),
    "_local_scalar_dense at ddp:OptimizerRole.update": (
        1,
        "the gradient's norm decides whether weights may change",
    ),
}
# Sites of fp32 tensors as large as half of the hidden states → why. All are diffusers' own, and
# what users sample with: the teacher would be another model without them.
WIDE = {
    "transformer_wan:WanTransformerBlock.forward": "scale, shift and residual sums in fp32",
    "transformer_wan:WanTransformer3DModel.forward": "scale and shift of the output in fp32",
    "transformer_wan:apply_rotary_emb": "the tables of rotary embeddings are fp32",
    "embeddings:TimestepEmbedding.forward": "fp32; of ti2v every token has a time of its own",
    "normalization:FP32LayerNorm.forward": "layer norms in fp32",
    "normalization:RMSNorm.forward": "q's and k's; one kernel on a GPU, written out by fakes",
}


def table() -> Mapping[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def numbers_of(found: Found) -> dict[str, Any]:
    """A case's entry in the table."""
    return {step: asdict(numbers) for step, numbers in found.steps.items()}


def complaints(case: Case, found: Found, expected: Mapping[str, Any]) -> list[str]:
    """One line for each fault; `expected`: the case's entry in the table."""
    lines = [found.error] if found.error else []
    updates = 1 if OPTIONS[case.option].method == "lora" else 2
    for wait, times in found.waits.items():
        most, _ = WAITS.get(wait, (0, ""))
        if times > most * updates:
            lines.append(f"the CPU waits for the device: {wait}, {times} times")
    for made, times in found.wide.items():
        if re.sub(r"^\S+ at | \(backward\)$", "", made) not in WIDE:
            lines.append(f"fp32 as large as an activation: {made}, {times} times")
    for dtypes, times in found.operands.items():
        if dtypes != "bfloat16, bfloat16, bfloat16":
            lines.append(f"query, key, value of an attention: {dtypes}, {times} times")
    if found.error:
        return lines
    for step, numbers in numbers_of(found).items():
        for name, number in numbers.items():
            known = expected.get(step, {}).get(name, 0)
            if abs(number - known) > TOLERANCE * known:
                lines.append(f"{step}, {name}: found {number}, the table has {known}")
    return lines + [f"{step}: not done" for step in expected.keys() - found.steps.keys()]
