"""Counted randomness: every draw is a pure function of (seed, purpose, step, sample).

Nothing here depends on what was drawn before, on the process, or on the device, so a resumed run
and a run on another number of ranks see the same numbers.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def counted_seed(seed: int, purpose: str, *counters: int | str) -> int:
    """64 well-mixed bits from the seed, a purpose and counters."""
    text = "|".join(map(str, (seed, purpose, *counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def counted_rng(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """A numpy generator for one purpose at one count."""
    return np.random.Generator(np.random.Philox(counted_seed(seed, purpose, *counters)))


def torch_rng(seed: int, purpose: str, *counters: int | str) -> torch.Generator:
    """A CPU generator: CUDA's would draw other numbers than the CPU's from the same seed."""
    return torch.Generator().manual_seed(counted_seed(seed, purpose, *counters) >> 1)


def noise(
    shape: Sequence[int], seed: int, purpose: str, step: int, samples: Sequence[int]
) -> torch.Tensor:
    """(B, *shape) fp32 standard normal; row i belongs to global sample `samples[i]` of `step`."""
    rows = [
        torch.randn(*shape, generator=torch_rng(seed, purpose, step, sample)) for sample in samples
    ]
    return torch.stack(rows)


def uniform(seed: int, purpose: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """(B,) fp32 in [0, 1), one for each global sample of `step`."""
    return torch.tensor(
        [counted_rng(seed, purpose, step, sample).random() for sample in samples],
        dtype=torch.float32,
    )


def choice(options: Sequence[int], seed: int, purpose: str, step: int) -> int:
    """One of `options`, uniformly, the same for all samples (and so all ranks) of `step`."""
    return options[int(counted_rng(seed, purpose, step).integers(len(options)))]
