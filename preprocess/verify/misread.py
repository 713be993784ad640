"""Findings about samples of the first frame rule that hold other pictures than are shown."""

from rich.console import Console

from preprocess.dataset.old_samples import OldSample, judged, rows_of_first_rule
from preprocess.media.remote import DataDir
from preprocess.media.tars import base_folder, media_named
from preprocess.media.worker_pool import WorkerPool, default_workers
from preprocess.verify.findings import Finding
from shared.cli.console import bar, count, named
from shared.errors import UserError
from shared.format.cache import committed_shards, open_cache
from shared.io.names import quoted
from shared.io.store import Store


def findings(store: Store, data_dir: DataDir, console: Console, *, timeout: float) -> list[Finding]:
    """What is wrong with samples of the first frame rule, by their media in `data_dir`.

    Empty where a cache has none, or has no index. `timeout`: seconds a media file may take.
    """
    try:
        index = open_cache(store)
        rows = rows_of_first_rule(index, committed_shards(store.folder))
    except UserError:  # which is a finding already
        return []
    if not rows:
        return []
    base = base_folder(data_dir)
    found, unseen = [], []
    with (
        bar(console, "probing sources", len(rows)) as advance,
        WorkerPool(default_workers(), timeout=timeout) as pool,
    ):
        for sample in judged(index, rows, lambda source: media_named(base, source), pool, advance):
            if sample.wrong is not None:
                found.append(_wrong(sample, store))
            elif sample.unseen is not None:
                unseen.append(sample)
    found.sort(key=lambda finding: (finding.file, finding.key or ""))
    return found + ([_unseen(unseen, data_dir)] if unseen else [])


def _wrong(sample: OldSample, store: Store) -> Finding:
    return Finding(
        severity="error",
        code="frames-misread",
        file=sample.shard,
        key=sample.key,
        found=f"{sample.source}: {sample.wrong}",
        expected="the frames that players show",
        cure="run `wanprep encode` again, with the options of this cache and --output "
        f"{quoted(store)}: it encodes these samples anew and takes the old ones out",
    )


def _unseen(samples: list[OldSample], data_dir: DataDir) -> Finding:
    sources = named(sorted({sample.source for sample in samples}))
    return Finding(
        severity="note",
        code="source-missing",
        file=samples[0].shard,
        found=f"{count(len(samples), 'sample')} that an older wandistill encoded, whose "
        f"sources can't be read in {data_dir}: {sources} ({samples[0].unseen})",
        expected="the media that were encoded, to see whether the right frames were taken",
        cure="set --train-data-dir to the folder of the media; where they lie there, mend what the "
        "reason says",
    )
