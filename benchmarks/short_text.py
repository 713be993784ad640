"""`wantrain` with text at its own length: the same velocities for a toy, in half the time.

    python benchmarks/short_text.py distill --model toy-experts …

Text is padded to 512 tokens with zeros, which for a toy of 80 video tokens is most of a pass. All
padding has the same key and value, so one row whose score is higher by log n weighs as much as n
rows, as in `toy_sampling.py`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))

from wandistill_cli import wantrain

TEXT_LENGTH = 512
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
        mask = torch.zeros(1, 1, 1, text.shape[1], dtype=hidden_states.dtype)
        mask[..., -1] = math.log(TEXT_LENGTH - text.shape[1] + 1)
    return _attend(self, attn, hidden_states, text, mask, *rest)


def use_short_text() -> None:
    """For all of diffusers' Wan transformers of this process."""
    WanTransformer3DModel.forward = forward
    WanAttnProcessor.__call__ = attend


if __name__ == "__main__":
    use_short_text()
    wantrain()
