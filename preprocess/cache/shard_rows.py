"""A shard's rows of the index as an object beside it, for stores where reading a tar is a download.

Written before the sidecar, from the tar; never needed, since the tar says the same.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.format.cache import Sidecar
from shared.format.columns import COLUMNS, Columns, column_digest
from shared.format.schema import MEDIA_TYPES, MOST_REPEATS
from shared.io.mirror import ROWS_SUFFIX
from shared.models.spec import MAX_TEXT_TOKENS


def pack_rows(columns: Columns, sha256: str) -> bytes:
    """safetensors of one shard's columns; `sha256` is the tar's."""
    arrays = {name: np.ascontiguousarray(columns[name]) for name in COLUMNS}
    return save(arrays, metadata={"shard": sha256, "rows": _digest(arrays)})


def stored_rows(folder: Path, sidecar: Sidecar) -> Columns | None:
    """The columns of a shard; None where there are none, or not of this tar, or damaged ones."""
    path = (folder / sidecar.shard).with_suffix(ROWS_SUFFIX)
    try:
        with safe_open(path, framework="numpy") as stored:
            said = stored.metadata() or {}
            columns = {name: stored.get_tensor(name) for name in COLUMNS}
    except (OSError, SafetensorError):
        return None
    whole = said.get("shard") == sidecar.sha256 and said.get("rows") == _digest(columns)
    return columns if whole and _fits(columns, sidecar) else None


def _fits(columns: Columns, sidecar: Sidecar) -> bool:
    """Whether they can be the rows of this shard: a store may hold what anybody put there."""
    for name, (dtype, per_row) in COLUMNS.items():
        if columns[name].dtype != dtype or columns[name].shape != (sidecar.count, *per_row):
            return False
    most = {"type": len(MEDIA_TYPES) - 1, "tokens": MAX_TEXT_TOKENS, "repeats": MOST_REPEATS}
    if any(((columns[name] < 0) | (columns[name] > last)).any() for name, last in most.items()):
        return False
    if (columns["repeats"] < 1).any():
        return False
    offsets, lengths = columns["offset"], columns["length"]
    sizes_fit = (offsets >= 0) & (lengths >= 0) & (lengths <= sidecar.bytes - offsets)
    return bool(sizes_fit.all())


def _digest(columns: Columns) -> str:
    return "-".join(column_digest(columns[name])[:8] for name in COLUMNS)
