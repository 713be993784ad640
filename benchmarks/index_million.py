"""A million samples in an index: seconds and memory to write it, open it, plan from it, rebuild it.

    python benchmarks/index_million.py                     # synthetic rows, no tars
    python benchmarks/index_million.py --tars 100000       # real tars, rebuilt by `wanprep index`

Synthetic rows go through the code that writes the index of every cache and are opened as `wantrain`
and `wanprep encode` open it; each step runs in a process of its own, whose peak memory is shown.
With `--tars`, samples of a few hundred bytes a member are written by the real writer, the index is
thrown away, and the console script makes it again from the tars alone; so the time is that of
headers and JSON, not of gigabytes. Everything lies in a temporary folder, which is removed.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from train.data.batch_plan import BatchPlan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHARD_SAMPLES = 256
"""Samples of a synthetic shard: of 1 MB each in a shard of 256 MB."""
SAMPLE_BYTES = 1_000_000
RANKS = 512
"""Of the run that is planned, one sample each in an update."""
FINGERPRINT = {"format": 1, "mode": "t2v"}


def write(folder: Path, samples: int) -> None:
    """Sidecars (their tars empty, but long), rows as they come from tars, index and manifest."""
    import numpy as np

    from preprocess.cache.index import entries_of, write_index
    from shared.format.buckets import Bucket
    from shared.format.cache import Sidecar
    from shared.io.store import Store

    buckets = [Bucket(480, 832, 81), Bucket(832, 480, 81), Bucket(640, 640, 1)]
    shards = -(-samples // SHARD_SAMPLES)
    with timed("sidecars (not part of it)"):
        for number in range(shards):
            bucket = buckets[number % len(buckets)]
            stem = f"h{bucket.height}-w{bucket.width}-f{bucket.frames}-w000-{number:05d}"
            tar = folder / f"{stem}.tar"
            with tar.open("wb") as stream:
                stream.truncate(SHARD_SAMPLES * SAMPLE_BYTES)
            sidecar = Sidecar(
                shard=tar.name,
                kind="samples",
                sha256=f"{number:064x}",
                bytes=SHARD_SAMPLES * SAMPLE_BYTES,
                count=SHARD_SAMPLES,
                bucket=bucket,
                fingerprint=FINGERPRINT,
            )
            Sidecar.path_for(tar).write_text(json.dumps(sidecar.to_json()))
    with timed("read sidecars"):
        entries = entries_of(folder)
    random = np.random.default_rng(1)
    place = np.arange(samples, dtype=np.int64) % SHARD_SAMPLES * SAMPLE_BYTES
    columns = {
        "key": random.integers(0, 256, (samples, 16), np.uint8),
        "caption": random.integers(0, 256, (samples, 16), np.uint8),
        "bucket": np.zeros(samples, np.int32),
        "shard": np.arange(samples, dtype=np.int32) // SHARD_SAMPLES,
        "type": np.zeros(samples, np.uint8),
        "tokens": random.integers(1, 513, samples, np.int32),
        "repeats": np.ones(samples, np.int32),
        "offset": place[:, None] + np.arange(4) * 1000,
        "length": np.full((samples, 4), 900, np.int64),
        "states": np.zeros((samples, 2), np.int64),
    }
    with timed("sort, write index.zarr and manifest"):
        write_index(
            Store(folder), entries, ({sidecar.shard for sidecar in entries.samples}, columns)
        )


def read(folder: Path) -> None:
    """As `wantrain` does."""
    from fractions import Fraction

    from shared.format.cache import open_cache
    from shared.io.store import Store
    from train.data.batch_plan import BatchPlan
    from train.data.dataset import dataset_of

    with timed("open"):
        index = open_cache(Store(folder))
    with timed("plan, first batch"):
        data = dataset_of([(index, Fraction(1))])
        repeats, epochs = data.shown(video_repeat=1)
        plan = BatchPlan(data.bucket_ids, repeats, RANKS, seed=1, epochs=epochs)
        rows = plan.batch(0)
    with timed("the last batch of the next epoch"):
        plan.batch(2 * plan.batches_per_epoch - 1)
    show_peak("peak memory so far")
    with timed(f"steps and shares of {RANKS} ranks"):
        _check_shares(plan, data.bucket_ids)
    with timed("read and check all columns"):
        index.read_columns()
    with timed("where the members of a batch lie"):
        for sample in rows:
            part, row = data.place(int(sample))
            data.parts[part].index.place(row, "json")


def _check_shares(plan: "BatchPlan", bucket_ids: "npt.NDArray[np.int32]") -> None:
    """That all ranks have the same number of steps, at each of them one bucket, and together every
    sample once, but for those that fill batches."""
    import numpy as np

    from train.data.batch_plan import micro_batch

    order = plan.epoch(0)
    shares = [
        micro_batch(RANKS, micro_step=0, data_rank=rank, data_size=RANKS, accumulation=1)
        for rank in range(RANKS)
    ]
    steps = {len(order[:, share.start : share.stop]) for share in shares}
    assert steps == {plan.batches_per_epoch}
    assert sorted(position for share in shares for position in share) == list(range(RANKS))
    assert (bucket_ids[order] == bucket_ids[order[:, :1]]).all()
    counts = np.bincount(order.ravel(), minlength=len(bucket_ids))
    assert counts.min() == 1 and counts.sum() == len(bucket_ids) + plan.tail_samples


def again(folder: Path) -> None:
    """As `wanprep encode` does when there is nothing to do, without looking into the media."""
    from preprocess.cache.index import settled_index
    from preprocess.encode.work import committed_of
    from shared.io.store import Store

    with timed("sidecars, index, columns"):
        index = settled_index(Store(folder))
    with timed("what is committed"):
        committed = committed_of(index)
    keys = index.hex_keys()
    with timed("look every sample up"):
        assert all(key in committed for key in keys)


def write_tars(folder: Path, samples: int) -> None:
    import torch

    from preprocess.cache.writer import ShardWriter
    from shared.format.schema import Sample, SampleInfo, sample_key
    from shared.io.store import Store

    writer = ShardWriter(Store(folder), FINGERPRINT, shard_bytes=64_000_000)
    latents, text, cond = torch.zeros(2, 3, 4, 4), torch.zeros(8, 8), torch.ones(2, 3, 4, 4)
    with timed("write tars (not part of it)"):
        for number in range(samples):
            info = SampleInfo(
                caption=f"sample {number}, as a caption of some length may have it",
                type="video",
                source=f"clips/{number}.mp4",
                width=32,
                height=32,
                frames=9,
                frame_indices=list(range(0, 18, 2)),
                fps=16.0,
                source_width=40,
                source_height=36,
            )
            key = sample_key(str(number), {}, 0)
            writer.add(Sample(key=key, info=info, latents=latents, text=text, cond=cond))
        writer.close()


def rebuild(folder: Path, samples: int) -> None:
    """The console script's work, from tars alone."""
    from shared.format.cache import open_cache
    from shared.io.store import Store

    before = time.perf_counter()
    command = [Path(sys.executable).with_name("wanprep"), "index", "--shards", folder]
    own = os.environ | {"PYTHONPATH": str(ROOT)}  # this checkout is measured
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=own)
    seconds = time.perf_counter() - before
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    assert len(open_cache(Store(folder))) == samples
    print(f"{'wanprep index, all of it':<44}{seconds:8.2f} s {cpu:8.2f} s CPU")
    each = f"{seconds / samples * 1e6:8.0f} µs {cpu / samples * 1e6:7.0f} µs CPU"
    print(f"{'  a sample':<44}{each}")
    print(f"{'  peak memory':<44}{used.ru_maxrss / 1024:8.0f} MiB")
    # Beside it: the headers of the same tars, by our reader and by Python's.
    from shared.format.schema import MEMBERS
    from shared.format.tar import members

    tars = sorted(folder.glob("*.tar"))[:4]
    for name, walk in (("shared.format.tar", None), ("tarfile", tarfile.open)):
        before, count = time.process_time(), 0
        for path in tars:
            with path.open("rb") as stream:
                if walk is None:
                    count += sum(1 for _ in members(stream, path.stat().st_size, MEMBERS))
                else:
                    with walk(fileobj=stream, mode="r:") as tar:
                        count += sum(1 for _ in tar)
        each = f"{(time.process_time() - before) / count * 1e6:8.1f} µs CPU a member"
        print(f"{f'  headers alone, {name}':<44}{each}")


def show_peak(what: str) -> None:
    """Of this process, until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:<44}{peak:8.0f} MiB", flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Wall time, and CPU time, which a busy machine does not stretch as much."""
    before, cpu = time.perf_counter(), time.process_time()
    yield
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    print(f"{what:<44}{seconds:8.2f} s {cpu:8.2f} s CPU", flush=True)


STEPS: dict[str, Callable[..., Any]] = {
    "write": write,
    "read": lambda folder, samples: read(folder),
    "again": lambda folder, samples: again(folder),
    "write-tars": write_tars,
    "rebuild": rebuild,
}
TITLES = {
    "write": "writing the index",
    "read": "opening it, as wantrain does",
    "again": "opening it, as wanprep encode does",
    "write-tars": "tars",
    "rebuild": "rebuilding the index from tars alone",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000, help="synthetic rows")
    parser.add_argument("--tars", type=int, metavar="N", help="real tars of N samples instead")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    samples = args.tars or args.samples
    if args.step:
        STEPS[args.step](args.folder, samples)
        if args.step != "rebuild":
            show_peak("peak memory")
        return
    folder = Path(tempfile.mkdtemp(prefix="index-"))
    try:
        print(f"{samples:,} samples")
        for step in ("write-tars", "rebuild") if args.tars else ("write", "read", "again"):
            print(f"\n{TITLES[step]}")
            own = ["--step", step, "--folder", str(folder), "--samples", str(samples)]
            subprocess.run([sys.executable, __file__, *own], check=True)
            if step == "write-tars":
                shutil.rmtree(folder / "index.zarr", ignore_errors=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
