"""Random choices as pure functions of (seed, content, purpose, variant), the same everywhere."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The draws of one variant of one media file."""

    seed: int
    sha256: str
    """Hex digest of the media file's bytes."""
    variant: int = 0
    """Variant 0 is what a run without variants draws."""

    def uniform(self, choices: int, purpose: str) -> int:
        """0 … choices−1. 256 bits leave the modulo no bias, and no library can change it."""
        seed = f"{self.seed}:{self.sha256}:{purpose}"
        if self.variant:
            seed += f":{self.variant}"
        return int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big") % choices

    def weighted(self, weights: Sequence[int], purpose: str) -> int:
        """0 … len(weights)−1, each as often as its weight says."""
        return bisect_right(list(accumulate(weights)), self.uniform(sum(weights), purpose))
