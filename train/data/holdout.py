"""`--holdout`: source files that a run never trains on, so that a loss on them tells of others.

By source, never by sample: captions, variants and clips of one file are held out together. Whether
a file is depends on its name in the shards and on nothing else, so that it stays held out when
others are added, in every folder, with every seed. Names stand in the samples' KEY.json, which are
read once; this machine remembers their hashes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.format.cache import CacheIndex
from shared.io.hashing import cache_folder
from shared.io.memo import remembered
from train.data.dataset import Dataset, Part
from train.data.filters import in_blocks, texts_of

_ALL = 2**64
Hashes = npt.NDArray[np.uint64]


def split_held_out(data: Dataset, share: float) -> tuple[Dataset, Dataset, list[str]]:
    """What is trained on, what is held out (about `share` of the files), and lines for people.

    UserError where that would be nothing or everything.
    """
    hashes = [hashes_of_sources(part.index)[part.rows] for part in data.parts]
    files = np.unique(np.concatenate(hashes))
    held = files[files < np.uint64(int(share * _ALL))]
    held = _with_equal_samples(data.parts, hashes, held)
    if not len(held) or len(held) == len(files):
        raise _refusal(share, files, everything=len(held) > 0)
    masks = [np.isin(of_part, held) for of_part in hashes]
    trained, tested = (
        Dataset(
            tuple(
                replace(part, rows=part.rows[mask == wanted])
                for part, mask in zip(data.parts, masks, strict=True)
            )
        )
        for wanted in (False, True)
    )
    lines = [
        f"held out {len(held)} of {len(files)} source files ({len(held) / len(files):.1%}), "
        f"{len(tested)} of {len(data)} samples: not trained on"
    ]
    return trained, tested, lines


def _with_equal_samples(parts: Sequence[Part], hashes: Sequence[Hashes], held: Hashes) -> Hashes:
    """Also the files of samples that another folder has under another name: keys tell content."""
    if len(parts) == 1:
        return held
    keys = [part.index.keys[part.rows].view("S16").reshape(-1) for part in parts]
    while True:
        theirs = np.concatenate([k[np.isin(h, held)] for k, h in zip(keys, hashes, strict=True)])
        equal = [h[np.isin(k, theirs)] for k, h in zip(keys, hashes, strict=True)]
        more = np.union1d(held, np.concatenate(equal))
        if len(more) == len(held):
            return held
        held = more


def _refusal(share: float, files: Hashes, *, everything: bool) -> UserError:
    if len(files) == 1:
        why = "the samples are all of one source file, and cannot be parted. Leave it out."
    elif everything:
        why = f"that would hold out all of the {len(files)} source files. Choose a smaller share."
    else:
        least = ceil((int(files[0]) / _ALL + 1e-9) * 1e4) / 1e4
        why = (
            f"that would hold out none of the {len(files)} source files. The least that holds out "
            f"one: --holdout {least:g}"
        )
    return UserError(f"--holdout: found {share:g}, but {why}")


def hashes_of_sources(index: CacheIndex) -> Hashes:
    """(N) of each sample's source, even over all 64 bits. UserError on damaged samples."""
    memo = cache_folder() / "sources" / index.digest
    found = np.zeros(len(index), dtype="<u8")

    def read(rows: npt.NDArray[np.intp]) -> None:
        for row, texts in texts_of(index, rows, ["source"]):
            name = texts["source"][0].encode("utf-8", "surrogatepass")
            found[row] = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")

    def read_all() -> bytes:
        in_blocks(index, np.arange(len(index)), read)
        return found.tobytes()

    packed = remembered(memo, found.nbytes, read_all)
    return np.frombuffer(packed, dtype="<u8").astype(np.uint64)
