"""Where the high-noise expert's results wait for the low-noise one, which is loaded after it.

One file for each clip, so that a run that is ended goes on where it was, on any number of ranks.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from shared.errors import UserError
from shared.format.fingerprint import Fingerprint
from shared.format.schema import pack
from shared.io.durable import write_bytes
from shared.io.hashing import digest_of
from train.synthesis.clips import Group

_X_T, _STATES = "x_t", "states"


@dataclass(frozen=True)
class HandedOver:
    """What becomes of a clip's path up to the level of the second expert."""

    x_t: torch.Tensor
    """(C, T, H, W) fp32, there."""
    states: torch.Tensor
    """(S, C, T, H, W), those so far, as they are stored."""


class Handover:
    """The files of one fingerprint in the output folder, where readers ignore them."""

    def __init__(self, output: Path, fingerprint: Fingerprint) -> None:
        self._folder = output / f".handover-{digest_of(fingerprint)[:12]}"

    def put(self, key: str, clip: HandedOver) -> None:
        """Store a clip's."""
        write_bytes(self._path(key), pack(**{_X_T: clip.x_t, _STATES: clip.states}))

    def get(self, key: str) -> HandedOver | None:
        """A clip's; None where there is none, or a torn one."""
        try:
            tensors = safetensors.torch.load(self._path(key).read_bytes())
            return HandedOver(tensors[_X_T], tensors[_STATES])
        except (OSError, SafetensorError, KeyError):
            return None

    def expect(self, key: str) -> HandedOver:
        """A clip's, which has been put there. UserError where it is gone."""
        found = self.get(key)
        if found is None:
            raise UserError(
                f"hand-over: {self._path(key)} is gone or damaged. Run the same command again."
            )
        return found

    def lacking(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with a clip of which there is none."""
        return [g for g in groups if any(self.get(clip.key) is None for clip in g.clips)]

    def delete(self, keys: Sequence[str]) -> None:
        """These are in shards."""
        for key in keys:
            self._path(key).unlink(missing_ok=True)
        with suppress(OSError):  # others may have theirs there
            self._folder.rmdir()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
