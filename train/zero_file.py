"""DeepSpeed's `zero_optimization`: of the launcher's file or ours, and what is so whatever it says.

The one section of such a file that counts; the rest would change what is computed, see docs/launch.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from shared.errors import UserError

CONFIG_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
"""How `accelerate launch` hands its processes the file, named by option or in its own config."""
CONFIGURATIONS = Path(__file__).parent / "launch_configs"

# DeepSpeed's own y = x·Wᵀ + b, put in place of torch's for the whole process, and on by default: in
# bf16 it rounds before the bias is added and after, where torch rounds once.
_OWN_LINEAR = "memory_efficient_linear"
# Fields that round what the processes tell one another, or delay steps → what to do instead.
_OTHER_NUMBERS = {
    "zero_quantized_weights": "--strategy ddp --base-precision int8 holds the base in 8 bits",
    "zero_quantized_nontrainable_weights": (
        "--strategy ddp --base-precision int8 holds the base in 8 bits"
    ),
    "zero_quantized_gradients": "the gradients of a LoRA are small",
    "zenflow": "the optimizer of a LoRA is small",
}


def stage_of_launcher() -> int | None:
    """The stage in the DeepSpeed file that `accelerate launch` was given; None: no file."""
    given = os.environ.get(CONFIG_VARIABLE)
    return _section_of(Path(given)).get("stage") if given else None


def zero_section(stage: Literal[2, 3]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section for this stage, of the launcher's file or the shipped one; what to tell of it.

    Raises UserError where the file can't be read, or asks for what is not done here.
    """
    given = os.environ.get(CONFIG_VARIABLE)
    path = Path(given) if given else CONFIGURATIONS / f"zero{stage}.json"
    section = _section_of(path)
    if (section.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise UserError(
            f"{path}: found zero_optimization.offload_optimizer; the optimizer of a LoRA is small "
            "and stays on the GPU. Remove that field; offload_param may stay."
        )
    for field, instead in _OTHER_NUMBERS.items():
        if section.get(field) not in (None, False, "auto"):
            raise UserError(
                f"{path}: found zero_optimization.{field}, which changes numbers: the run would "
                f"not be that of one process. Remove that field; {instead}."
            )
    notes = []
    if section.get(_OWN_LINEAR) is True:
        notes.append(
            f"{path}: {_OWN_LINEAR} is true there and false here; in bf16 it would round the "
            "output of every linear layer twice"
        )
    said = {field: value for field, value in section.items() if value != "auto"}
    return said | {"stage": stage, _OWN_LINEAR: False}, tuple(notes)


def _section_of(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"DeepSpeed's configuration {path} has no readable zero_optimization ({error}). "
            "Expected a JSON file as in DeepSpeed's documentation."
        ) from error
