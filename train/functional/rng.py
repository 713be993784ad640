"""Counted randomness: every draw is a pure function of (seed, purpose, step, sample).

Nothing here depends on what was drawn before, on the process, or on the device, so a resumed run
and a run on another number of ranks see the same numbers.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def counted_rng(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """A generator for one purpose at one count; 128 bits of key, so that streams never meet.

    numpy's, not torch's: torch seeds its CPU generator with 32 bits (of millions of streams some
    would be equal), and its CUDA generator draws other numbers than the CPU's.
    """
    text = "|".join(map(str, (seed, purpose, *counters)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def noise(
    shape: Sequence[int], seed: int, purpose: str, step: int, samples: Sequence[int]
) -> torch.Tensor:
    """(B, *shape) fp32 standard normal; row i belongs to global sample `samples[i]` of `step`."""
    rows = [
        counted_rng(seed, purpose, step, sample).standard_normal(tuple(shape), dtype=np.float32)
        for sample in samples
    ]
    return torch.from_numpy(np.stack(rows))


def clip_generator(seed: int, prompt: str) -> torch.Generator:
    """torch's own generator, on the CPU, of the noise of a clip that is made for a prompt."""
    return torch.Generator().manual_seed(int(counted_rng(seed, "sample", prompt).integers(2**32)))


def spread(seed: int, purpose: str, step: int, samples: Sequence[int], strata: int) -> torch.Tensor:
    """(B,) fp32 in [0, 1), each uniform by itself, any `strata` samples in a row spread evenly.

    [0, 1) is cut into `strata` equal parts, which a permutation, drawn anew for each step, deals
    out to the samples; each is uniform within its part. One part: each is drawn independently.
    """
    parts = counted_rng(seed, f"{purpose} part", step).permutation(strata)
    inside = [counted_rng(seed, purpose, step, sample).random() for sample in samples]
    owned = [int(parts[sample % strata]) for sample in samples]
    drawn = [(part + share) / strata for part, share in zip(owned, inside, strict=True)]
    return torch.tensor(drawn, dtype=torch.float32)


def choice(options: Sequence[int], seed: int, purpose: str, step: int) -> int:
    """One of `options`, uniformly, the same for all samples (and so all ranks) of `step`."""
    return options[int(counted_rng(seed, purpose, step).integers(len(options)))]
