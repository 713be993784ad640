"""`wantrain` with text at its own length: the same velocities for a toy, in half the time.

    python benchmarks/short_text.py distill --model toy-experts …

Text is padded to 512 tokens with zeros, which for a toy of 80 video tokens is most of a pass. All
padding has the same key and value, so one row whose score is higher by log n weighs as much as n
rows, as in `toy_sampling.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run from a checkout, as toy_students.py

from toy_sampling import TEXT_LENGTH, padding_bias  # noqa: E402

from wandistill_cli import wantrain  # noqa: E402

_forward = WanTransformer3DModel.forward
_attend = WanAttnProcessor.__call__


def forward(
    self: Any,
    hidden_states: Any,
    timestep: Any,
    encoder_hidden_states: Any,
    *rest: Any,
    **more: Any,
) -> Any:
    """With text [B, 512, dim] cut one row after the longest of its batch."""
    if encoder_hidden_states.shape[1] == TEXT_LENGTH:
        words = encoder_hidden_states.ne(0).any(dim=(0, 2)).nonzero()
        length = int(words.max()) + 1 if len(words) else 0
        encoder_hidden_states = encoder_hidden_states[:, : min(length + 1, TEXT_LENGTH)]
    return _forward(self, hidden_states, timestep, encoder_hidden_states, *rest, **more)


def attend(
    self: Any, attn: Any, hidden_states: Any, text: Any = None, mask: Any = None, *rest: Any
) -> Any:
    """Cross-attention whose last text token stands for all padding."""
    if text is not None and mask is None:
        mask = padding_bias(text.shape[1]).to(hidden_states.dtype)
    return _attend(self, attn, hidden_states, text, mask, *rest)


def use_short_text() -> None:
    """For all of diffusers' Wan transformers of this process."""
    WanTransformer3DModel.forward = forward
    WanAttnProcessor.__call__ = attend


if __name__ == "__main__":
    use_short_text()
    wantrain()
