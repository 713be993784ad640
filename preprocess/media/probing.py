"""What media hold, and digests of their content: each is opened only where no memo tells both."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from preprocess.frames.media_info import Kind, MediaError, Probe
from preprocess.media.decode import probe_file
from preprocess.media.probe_cache import ProbeMemo
from preprocess.media.sources import MediaFile, stamp
from preprocess.media.worker_pool import WorkerPool
from shared.io.hashing import FileHasher

Item = TypeVar("Item")
Probed = tuple[Probe, str]
"""With the SHA-256 of the content."""


def probed(
    items: Iterable[tuple[Item, MediaFile, Kind]], hasher: FileHasher, pool: WorkerPool
) -> Iterator[tuple[Item, Probed | MediaError | OSError]]:
    """Items with what their media hold, or why nothing is known.

    Those that were opened before come first, the others as they are done.
    """
    probes = ProbeMemo()
    tasks = []
    for item, media_file, kind in items:
        name = stamp(media_file, hasher)
        sha256 = None if name is None else hasher.known(name)
        known = None if name is None else probes.known(name, kind) or probes.known(name, "auto")
        if known is not None and sha256 is not None and kind in ("auto", known.type):
            yield item, (known, sha256)
        else:
            tasks.append(((item, media_file, kind, name), (media_file, kind, sha256)))
    opened = pool.completed(probe_file, tasks, source=lambda task: task[1], ahead=4 * pool.workers)
    for (item, _, kind, name), future in opened:
        try:
            probe, sha256 = future.result()
        except (MediaError, OSError) as error:
            yield item, error
            continue
        if name is not None:
            hasher.remember(name, sha256)
            probes.remember(name, kind, probe)
        yield item, (probe, sha256)
