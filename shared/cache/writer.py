"""Shards: one open tar per bucket, hashed while it is written, committed whole.

A shard exists once its sidecar does (`shared.format.cache.Sidecar`), which is written last.
Whatever a killed run left without one is removed by the next.
"""

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset

from shared.cache.shard_rows import pack_rows, scan_shard
from shared.cli.support import echo
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import SHARD_NAME, TOMBSTONES, Sidecar, Tombstones, age
from shared.format.fingerprint import Fingerprint
from shared.format.latent_rgb import ColourFit, ColourSums
from shared.format.prompts import Prompt
from shared.format.schema import Sample
from shared.format.tar import room
from shared.io.durable import (
    TEMPORARY_SUFFIX,
    DurableFile,
    remove,
    remove_tree,
    temporary,
    write_bytes,
    write_json,
)
from shared.io.locks import file_lock, without_locks
from shared.io.mirror import ROWS_SUFFIX
from shared.io.store import Store

LOCK = ".lock"
MOST_WRITERS = 1000
"""w000 … w999."""

# Each open shard is an open file; more buckets than this are written in turns.
MOST_OPEN_SHARDS = 128


class _HashingFile(DurableFile):
    """What `TarWriter` writes to: counts and hashes on the way, so nothing is read again."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._discarded = False

    def write(self, data: bytes | memoryview) -> int:
        if self._discarded:  # tarfile writes a last block from its destructor
            return len(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return super().write(data)

    def discard(self) -> None:
        self._discarded = True
        super().discard()


class _OpenShard:
    """A tar under its temporary name."""

    def __init__(self, store: Store, final: Path) -> None:
        self._store = store
        self.final = final
        self.count = 0
        self.colours: ColourFit | None = None
        """For the latent → RGB map, in the sidecar."""
        self.size = 0
        """Bytes of its members and their headers; `tarfile` holds the last ones back a while."""
        self._file = _HashingFile(temporary(final))
        # Everything that tar headers hold is fixed: the same samples give the same bytes.
        self._tar = webdataset.TarWriter(
            self._file, user="root", group="root", mode=0o644, mtime=0, encoder=False
        )

    def add(self, key: str, members: dict[str, bytes], colours: ColourFit | None = None) -> None:
        for suffix, data in members.items():  # one by one: TarWriter would sort them
            self._tar.write({"__key__": key, suffix: data})
            self.size += room(len(data))
        self.count += 1
        if colours is not None:
            self.colours = colours if self.colours is None else self.colours + colours

    def commit(self, *, kind: str, bucket: Bucket | None, fingerprint: Fingerprint) -> Sidecar:
        self._tar.close()
        self._file.close()
        self._store.commit(temporary(self.final), self.final)
        sidecar = Sidecar(
            shard=self.final.name,
            kind=kind,
            sha256=self._file.sha256.hexdigest(),
            bytes=self._file.bytes,
            count=self.count,
            bucket=bucket,
            fingerprint=fingerprint,
            latent_rgb=None if self.colours is None else self.colours.to_json(),
        )
        if self._store.is_remote and kind == "samples":
            # So that no other machine must fetch the tar for the index.
            rows = pack_rows(scan_shard(self._store, sidecar), sidecar.sha256)
            path = self.final.with_suffix(ROWS_SUFFIX)
            write_bytes(path, rows, commit=self._store.commit)
        write_json(Sidecar.path_for(self.final), sidecar.to_json(), commit=self._store.commit)
        return sidecar

    def discard(self) -> None:
        """Leave nothing of the shard, so that a full disk gets its space back."""
        self._file.discard()
        remove(temporary(self.final))
        self._store.remove(self.final)


class ShardWriter:
    """Fills one shard per bucket and commits each when it is full.

    Used by one process at a time (`output_lock`, or `writer_lock` of this number).
    """

    def __init__(
        self, store: Store, fingerprint: Fingerprint, *, shard_bytes: int, writer: int = 0
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._shard_bytes = shard_bytes
        self._writer = writer
        self._open: dict[Bucket, _OpenShard] = {}
        remove_uncommitted(store, writer)
        self._next_number = _next_number(store.folder)

    def add(self, sample: Sample, frames: npt.NDArray[np.uint8] | None = None) -> None:
        """Append a sample to its bucket's shard. Raises OSError when the disk is full.

        `frames` (F, H, W, 3) RGB, which its latents are of, count for the latent → RGB map, where
        they are at hand and no other sample of the clip brings them.
        """
        colours = None
        if frames is not None and sample.latents is not None:
            colours = ColourFit.of(sample.key, ColourSums.of(frames, sample.latents))
        self.add_members(sample.key, sample.info.bucket, sample.members(), colours)

    def add_members(
        self, key: str, bucket: Bucket, members: dict[str, bytes], colours: ColourFit | None = None
    ) -> None:
        """`add` of a sample that is packed already: suffix → bytes, in tar order."""
        if bucket not in self._open:
            if len(self._open) >= MOST_OPEN_SHARDS:
                self._commit(next(iter(self._open)))
            stem = f"h{bucket.height}-w{bucket.width}-f{bucket.frames}"
            self._open[bucket] = _OpenShard(self._store, self._new_path(stem))
        shard = self._open[bucket]
        try:
            shard.add(key, members, colours)
        except BaseException:  # the tar now ends in half a sample
            self._open.pop(bucket).discard()
            raise
        if shard.size >= self._shard_bytes:
            self._commit(bucket)

    def add_prompts(self, prompts: list[Prompt]) -> None:
        """Commit a shard of the prompt bank that holds these prompts."""
        shard = _OpenShard(self._store, self._new_path("prompts"))
        try:
            for prompt in prompts:
                shard.add(prompt.key, prompt.members())
            shard.commit(kind="prompts", bucket=None, fingerprint=self._fingerprint)
        except BaseException:
            shard.discard()
            raise

    def add_tombstones(self, keys: Iterable[str]) -> None:
        """Remove these samples from the cache: dead in every shard that there is so far.

        One small file, whole or not at all: either all of them are removed or none.
        """
        path = self._new_path(TOMBSTONES).with_suffix(".json")
        removed = Tombstones(name=path.name, sha256="", keys=tuple(sorted(keys)))
        write_json(path, removed.to_json(), commit=self._store.commit)

    def close(self) -> None:
        """Commit every open shard."""
        while self._open:
            self._commit(next(iter(self._open)))

    def rescue(self) -> None:
        """After an OSError: commit what still can be; the rest is encoded again by the next run."""
        while self._open:
            with suppress(OSError):
                self._commit(next(iter(self._open)))

    def _commit(self, bucket: Bucket) -> None:
        shard = self._open.pop(bucket)
        try:
            shard.commit(kind="samples", bucket=bucket, fingerprint=self._fingerprint)
        except BaseException:
            shard.discard()
            raise

    def _new_path(self, stem: str) -> Path:
        number = self._next_number
        self._next_number += 1
        return self._store.folder / f"{stem}-w{self._writer:03d}-{number:05d}.tar"


def remove_uncommitted(store: Store, writer: int | None) -> None:
    """Delete what killed runs of this writer left: temporary files, tars without a sidecar.

    `None`: of every writer, which only the holder of `output_lock` may ask for.
    """
    for path in store.folder.iterdir():
        name = SHARD_NAME.match(path.name.replace(".json", ".tar"))
        if name is None or writer not in (None, int(name["writer"])):
            continue
        unfinished = path.suffix == TEMPORARY_SUFFIX
        without_sidecar = path.suffix == ".tar" and not Sidecar.path_for(path).exists()
        if unfinished or without_sidecar:
            store.remove(path)


def _next_number(folder: Path) -> int:
    """One more than the highest number of any writer, tombstones and deleted tars included.

    So whatever this writer adds is newer than all that was there when it began.
    """
    return max((age(path.name)[0] for path in folder.iterdir()), default=-1) + 1


def output_lock(folder: Path) -> AbstractContextManager[None]:
    """The folder for one process alone; refused while any other writes there.

    The system drops the lock when the process ends, however it ends.
    """
    return _locked(folder, LOCK, patience=0)


def reader_lock(folder: Path) -> AbstractContextManager[None]:
    """What is committed in the folder stays there: others may add to it, nobody has `output_lock`.

    Raises UserError where somebody has.
    """
    return _locked(folder, LOCK, shared=True, patience=_PATIENCE)


@contextmanager
def writer_lock(folder: Path, writer: int) -> Iterator[None]:
    """The folder beside other writers, but none of this number, and nobody with `output_lock`."""
    with reader_lock(folder), _own_number(folder, writer, patience=_PATIENCE):
        yield


@contextmanager
def free_writer_lock(folder: Path, first: int) -> Iterator[int]:
    """`writer_lock` of a number that no living writer has: `first`, else one of those after it.

    Never 0, and beyond 999 begins at 1 again.
    """
    with ExitStack() as held:
        held.enter_context(reader_lock(folder))
        for number in chain(range(first, MOST_WRITERS), range(1, first)):
            with suppress(UserError):
                held.enter_context(_own_number(folder, number, patience=0))
                break
        else:
            raise _taken(folder)
        yield number


def index_lock(folder: Path) -> AbstractContextManager[None]:
    """For the moment in which index and manifest are derived; waits for its turn."""
    return _locked(folder, f"{LOCK}-index", patience=None)


def remove_abandoned(store: Store, world: int) -> None:
    """Delete what killed writers left whose numbers the `world` writers of this run don't use.

    Those below `world` clean up after themselves; a writer that lives holds its lock. On an object
    store nobody sees locks, so `compact`, which wants no other writer, cleans up there.
    """
    if store.is_remote:
        return
    folder = store.folder
    leftovers = {
        int(name["writer"]) for path in folder.iterdir() if (name := _ABANDONED(path.name))
    }
    for writer in sorted(number for number in leftovers if number >= world):
        with suppress(UserError), _own_number(folder, writer, patience=0):
            remove_uncommitted(store, writer)
            for texts in folder.glob(f".text-*-w{writer:03d}"):
                remove_tree(texts)
            remove(folder / f"rejected-w{writer:03d}.jsonl")


_ABANDONED = re.compile(r".*-w(?P<writer>\d{3})(?:-\d{5,}.*|\.jsonl)?$").match

# Another process holds a writer's lock for a moment while it cleans up after the dead.
_PATIENCE = 2.0


def _taken(folder: Path) -> UserError:
    return UserError(
        f"--output: another process is writing to {folder}. Wait for it to end, or give this run a "
        "folder of its own (--output)."
    )


def _own_number(folder: Path, writer: int, *, patience: float) -> AbstractContextManager[None]:
    return _locked(folder, f"{LOCK}-w{writer:03d}", patience=patience)


@contextmanager
def _locked(
    folder: Path, name: str, *, shared: bool = False, patience: float | None
) -> Iterator[None]:
    """A lock file held; UserError where it is not to be had within `patience` seconds."""
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks = held.enter_context(file_lock(folder / name, shared=shared, patience=patience))
        except BlockingIOError as error:
            raise _taken(folder) from error
        except OSError as error:
            raise UserError(
                f"--output: cannot write to {folder} ({error.strerror}). Choose another folder."
            ) from error
        if locks is None and name == LOCK:
            echo(f"note     {without_locks(folder)}", err=True)
        yield


@contextmanager
def refusals_explained(folder: Path, kept: str) -> Iterator[None]:
    """Turn an OSError of writing to `folder` into a UserError that says what can be done.

    `kept` says what became of the work so far.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "The disk is full or a quota is used up: make room." if full else "Mend that."
        raise UserError(f"--output: writing to {folder} failed ({error}). {cure} {kept}") from error
