"""DeepSpeed's `zero_optimization`: the launcher's file or ours, and what is fixed here.

The one section of such a file that counts; the rest would change what is computed, see docs/launch.
Not in `strategies/`: which strategy a launcher wants is read here, too.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from shared.errors import UserError

CONFIG_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
"""How `accelerate launch` hands its processes the file, named by option or in its own config."""
CONFIGURATIONS = Path(__file__).parents[1] / "launch_configs"

# DeepSpeed's own y = x·Wᵀ + b, put in place of torch's for the whole process, and on by default: in
# bf16 it rounds before the bias is added and after, where torch rounds once.
_OWN_LINEAR = "memory_efficient_linear"
# Fields that round what ranks exchange, or delay steps → what to do instead.
_OTHER_NUMBERS = {
    **dict.fromkeys(
        ("zero_quantized_weights", "zero_quantized_nontrainable_weights"),
        "--strategy ddp --base-precision int8 holds the base in 8 bits",
    ),
    "zero_quantized_gradients": "the gradients of a LoRA are small",
    "zenflow": "the optimizer of a LoRA is small",
}


_ABSENT = (None, False, "auto")
"""What a field may say that asks for nothing."""


def stage_of_launcher() -> int | None:
    """The stage in the DeepSpeed file that `accelerate launch` was given; None: no file."""
    given = os.environ.get(CONFIG_VARIABLE)
    return _section_of(Path(given)).get("stage") if given else None


def zero_section(stage: Literal[2, 3]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section for this stage, of the launcher's file or the shipped one; notes to print.

    Raises UserError where the file can't be read, or asks for what is not done here.
    """
    given = os.environ.get(CONFIG_VARIABLE)
    path = Path(given) if given else CONFIGURATIONS / f"zero{stage}.json"
    section = _section_of(path)
    for field in ("offload_optimizer", "cpu_offload"):  # the second is the first's old form
        if _offloads(section.get(field)):
            raise UserError(
                f"{path}: found zero_optimization.{field}; the optimizer of a LoRA is small "
                "and stays on the GPU. Remove that field; offload_param may stay."
            )
    for field, instead in _OTHER_NUMBERS.items():
        if section.get(field) not in _ABSENT:
            raise UserError(
                f"{path}: found zero_optimization.{field}, which changes numbers: the run would "
                f"not be that of one process. Remove that field; {instead}."
            )
    notes = []
    if section.get(_OWN_LINEAR) not in (*_ABSENT, 0):
        notes.append(
            f"{path}: {_OWN_LINEAR} is true there and false here; in bf16 it would round the "
            "output of every linear layer twice"
        )
    kept = _without_auto(section)
    kept.pop("offload_optimizer", None)  # it asks for nothing, as was checked
    return kept | {"stage": stage, _OWN_LINEAR: False}, tuple(notes)


def _offloads(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("device") not in (*_ABSENT, "none")
    return value not in _ABSENT


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that Accelerate would fill, those of `offload_param` too."""
    return {
        field: _without_auto(value) if isinstance(value, dict) else value
        for field, value in section.items()
        if value != "auto"
    }


def _section_of(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"DeepSpeed's configuration {path} has no readable zero_optimization ({error}). "
            "Expected a JSON file as in DeepSpeed's documentation."
        ) from error
