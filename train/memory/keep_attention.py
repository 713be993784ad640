"""What self-attention gave in a checkpointed block, kept, and not computed again.

Of large clips it is most of the time of a recomputation.

Of an attention kernel its output and the sums of its softmax are kept, which is what its backward
pass needs beside queries, keys and values; those are cheap, and computed again. A kernel is seen by
its name among the operations that torch dispatches, whosever it is; that of self-attention by
queries and keys of one shape.

Not torch's `create_selective_checkpoint_contexts`: what it keeps, it keeps on the device, out of
reach of `train.memory.activation_offload`.
"""

import re
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from shared.errors import UserError, first_line
from train.model.attention import small_attention
from train.options import Precision

Put = Callable[[torch.Tensor], Any]
Fetch = Callable[[Any], torch.Tensor]

_FORWARD = re.compile(r"^(?!.*(backward|bwd)).*(attention|attn|flash)", re.IGNORECASE)


def _is_self_attention(operation: Any, args: tuple[Any, ...]) -> bool:
    if not _FORWARD.match(operation.name()):
        return False
    query, key, *_ = (one for one in args if isinstance(one, torch.Tensor))
    return bool(query.shape == key.shape)


class _Recording(TorchDispatchMode):
    """The forward pass of a block."""

    def __init__(self, kept: deque[Any], put: Put) -> None:
        super().__init__()
        self._kept, self._put = kept, put

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if _is_self_attention(func, args):
            (out, *others), form = tree_flatten(found)
            # Detached: autograd writes its graph into what the operation gave.
            small = (x.detach() if isinstance(x, torch.Tensor) else x for x in others)
            self._kept.append((form, self._put(out.detach()), *small))
        return found


class _Replaying(TorchDispatchMode):
    """The same again, in the backward pass."""

    def __init__(self, kept: deque[Any], fetch: Fetch) -> None:
        super().__init__()
        self._kept, self._fetch = kept, fetch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _is_self_attention(func, args):
            return func(*args, **(kwargs or {}))
        form, out, *others = self._kept.popleft()
        return tree_unflatten([self._fetch(out), *others], form)


def _same(tensor: Any) -> Any:
    return tensor


def keeping(put: Put = _same, fetch: Fetch = _same) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For `context_fn` of torch's checkpoint. `put` says what is held in place of an output, and
    `fetch` gives that output back, with the same values."""
    kept: deque[Any] = deque()
    return _Recording(kept, put), _Replaying(kept, fetch)


keep_attention = partial(
    checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=keeping
)
"""Gradient checkpointing that keeps them; for diffusers' `enable_gradient_checkpointing`."""


def check_keeps(name: str, device: str, precision: Precision) -> None:
    """UserError unless the kernel of an attention backend is seen here."""
    why = "torch does not see its kernel as one operation"
    kept: deque[Any] = deque()
    try:
        with _Recording(kept, _same):
            small_attention(name, device, precision)
    except Exception as error:  # of other people's kernels, as in `check_attention`
        why = first_line(error).rstrip(".")
    if not kept:
        raise UserError(
            f"--keep-attention: found with --attention-backend {name}, whose outputs can't be kept "
            f"here ({why}). Use another backend, or leave --keep-attention out."
        )
