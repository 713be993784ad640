"""Samples of the first frame rule that hold other pictures than their source shows.

For `wanprep verify`, which names them, and `wanprep encode`, which replaces them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from preprocess.dataset.recorded_clips import clip_of, same_content
from preprocess.frames.first_rule import wrong_sample
from preprocess.frames.media_info import Kind, MediaError, Probe
from preprocess.media.decode import look
from preprocess.media.probe_cache import ProbeMemo
from preprocess.media.sources import Medium, stamp
from preprocess.media.worker_pool import WorkerPool
from shared.cli.console import bar
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader, Sidecar
from shared.format.fingerprint import has_first_frame_rule
from shared.io.hashing import FileHasher

# Fields of `KEY.json` by which a sample is judged; its caption may be long.
_JUDGED_BY = (
    *("type", "source", "frame_rule", "frame_indices", "fps"),
    *("source_width", "source_height"),
)


@dataclass(frozen=True, kw_only=True)
class OldSample:
    """A sample that was made under the first frame rule."""

    key: str
    source: str
    type: Kind
    shard: str
    wrong: str | None = None
    """Why it does not hold what its source shows; None where it does."""
    unseen: str | None = None
    """Why its source could not be looked at."""


def rows_of_first_rule(index: CacheIndex, sidecars: list[Sidecar]) -> list[int]:
    """Rows of live samples with a medium in shards of the first frame rule."""
    old = {sidecar.shard for sidecar in sidecars if has_first_frame_rule(sidecar.fingerprint)}
    numbers = [number for number, shard in enumerate(index.shards) if shard in old]
    return [int(row) for row in np.flatnonzero(np.isin(index.shard_ids, numbers))]


def looked_at(
    index: CacheIndex,
    rows: list[int],
    medium_of: Callable[[str], Medium | None],
    pool: WorkerPool,
    on_progress: Callable[[], None],
) -> Iterator[OldSample]:
    """Each of these samples, judged by its source as it is now; in no fixed order.

    `medium_of` gives the medium of a source's name, None where it is to be passed over. Media are
    opened once, and not at all where they were before.
    """
    if not rows:
        return
    by_source: dict[tuple[str, Kind], list[int]] = {}
    infos: dict[int, dict[str, Any]] = {}
    reader = MemberReader(index)
    try:
        for row in rows:
            info = reader.info(row)
            if info["type"] == "text":  # has no source
                on_progress()
                continue
            infos[row] = {name: info[name] for name in _JUDGED_BY if name in info}
            by_source.setdefault((str(info["source"]), info["type"]), []).append(row)
    finally:
        reader.close()
    media = index.fingerprint.get("media", {})
    hasher, probes = FileHasher(), ProbeMemo()

    def judged(row: int, seen: tuple[Probe, str] | None, unseen: str | None) -> OldSample:
        info = infos[row]
        on_progress()
        wrong = None
        if seen is not None:
            probe, sha256 = seen
            if same_content({index.key(row)}, clip_of(index, row, info), sha256):
                wrong = wrong_sample(info, probe, media)
            else:
                unseen = f"{info['source']}: its content is not what was encoded"
        return OldSample(
            key=index.key(row),
            source=str(info["source"]),
            type=info["type"],
            shard=index.shards[int(index.shard_ids[row])],
            wrong=wrong,
            unseen=unseen,
        )

    tasks = []
    for (source, kind), its_rows in by_source.items():
        try:
            medium = medium_of(source)
        except (MediaError, UserError, OSError) as error:
            yield from (judged(row, None, str(error)) for row in its_rows)
            continue
        if medium is None:
            for _ in its_rows:
                on_progress()
            continue
        name = stamp(medium, hasher)
        sha256 = None if name is None else hasher.known(name)
        known = None if name is None else probes.known(name, kind) or probes.known(name, "auto")
        if known is not None and sha256 is not None and known.type == kind:
            yield from (judged(row, (known, sha256), None) for row in its_rows)
            continue
        tasks.append(((medium, name, kind, its_rows), (medium, kind, sha256)))
    done = pool.completed(look, tasks, source=lambda item: item[0], ahead=4 * pool.workers)
    for (_, name, kind, its_rows), future in done:
        try:
            probe, sha256 = future.result()
        except (MediaError, OSError) as error:
            yield from (judged(row, None, str(error)) for row in its_rows)
            continue
        if name is not None:
            hasher.remember(name, sha256)
            probes.remember(name, kind, probe)
        yield from (judged(row, (probe, sha256), None) for row in its_rows)


def superseded(
    index: CacheIndex,
    sidecars: list[Sidecar],
    media: Mapping[str, Medium],
    live: Collection[str],
    pool: WorkerPool,
    console: Console,
) -> dict[str, str]:
    """Key → source of samples whose place others take now: wrong ones, and no more `live`.

    `media`: what the dataset has, by source; of others nothing is said.
    """
    rows = [row for row in rows_of_first_rule(index, sidecars) if index.key(row) not in live]
    with bar(console, "looking at old samples", len(rows)) as advance:
        judged = looked_at(index, rows, media.get, pool, advance)
        return {sample.key: sample.source for sample in judged if sample.wrong is not None}
