"""Reading a cache: sidecars, `manifest.json`, `index.zarr`, members by byte range.

Tars and sidecars are the truth. Manifest and index are derived from them by `wanprep index`
(`shared/cache/index.py`); the layouts that both sides must agree on are the constants here.
"""

import hashlib
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import UserError
from shared.format.buckets import Bucket, bucket_of, is_bucket
from shared.format.columns import (
    COLUMNS,
    Columns,
    column_digest,
    hex_keys,
    read_attributes,
    read_column,
)
from shared.format.fingerprint import FORMAT_VERSION, Fingerprint, check_fingerprint
from shared.format.latent_rgb import LatentRgb
from shared.format.schema import (
    JSON_MEMBER,
    MEDIA_TYPES,
    MEMBERS,
    MOST_INFO_BYTES,
    MOST_REPEATS,
    TORCH_DTYPES,
    tensors_in,
    unpack,
    unpack_info,
)
from shared.format.strict_json import Fields, Fits, is_count, is_list, read_object, require
from shared.format.tensor_header import TensorHeader, read_head
from shared.io.names import quoted
from shared.io.store import Store
from shared.models.spec import MAX_TEXT_TOKENS

# h480-w832-f81-w000-00012.tar: bucket, writer, number. The number is higher than all that were
# there when the writer began, so it tells which of two shards that hold the same key is newer.
# Tombstones (tombstones-w000-00013.json) count on.
SHARD_NAME = re.compile(
    r"(?:(?P<samples>h\d+-w\d+-f\d+)|(?P<prompts>prompts)|tombstones)"
    r"-w(?P<writer>\d{3})-(?P<number>\d{5,})\.tar"
)
_KEY = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGE = re.compile(r"-w(?P<writer>\d+)-(?P<number>\d+)\.(?:tar|json)$")

REENCODE_SHARD = (
    "Restore the shard, or delete it with its sidecar and run `wanprep encode` again (in a folder "
    "captions or conditions: `wanprep recaption` or `add-condition`)."
)
MANIFEST = "manifest.json"
INDEX = "index.zarr"
TOMBSTONES = "tombstones"
# Bytes of JSON that are read at all; ten million samples need a tenth of it.
MOST_MANIFEST = 1 << 30
_MOST_SIDECAR, _MOST_TOMBSTONES = 1 << 24, 1 << 32
_SAMPLES, _PROMPTS = "samples", "prompts"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """`NAME.json` beside `NAME.tar`: written last, so a tar without one does not exist."""

    shard: str
    kind: str
    """"samples" or "prompts"."""
    sha256: str
    bytes: int
    count: int
    bucket: Bucket | None
    fingerprint: Fingerprint
    latent_rgb: dict[str, Any] | None = None
    """`ColourFit.to_json()` of the shard's samples; None where no frames were seen."""

    @staticmethod
    def path_for(shard: Path) -> Path:
        return shard.with_suffix(".json")

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            **self.__dict__,
            "bucket": self.bucket and asdict(self.bucket),
        }

    @classmethod
    def read(cls, path: Path, *, final: Path | None = None) -> "Sidecar":
        """Raises UserError when the file is damaged, of another tar or of another version.

        `final`: the name that it will have, where it lies under a temporary one.
        """
        cure = "If its tar is whole, delete the sidecar and the tar and run `wanprep encode` again."
        value = read_object(path, "sidecar", most=_MOST_SIDECAR, cure=cure)
        check_format(value, path)
        try:
            require(value, _SIDECAR_FIELDS, optional=("latent_rgb",))  # older shards have none
            if value["shard"] != (own := (final or path).with_suffix(".tar").name):
                raise UserError(
                    f"sidecar: {path} is of {value['shard']!r:.80}, expected {own!r}. If both were "
                    "renamed, write that name into its `shard`; else restore it, or delete it and "
                    "its tar and run `wanprep encode` again."
                )
            kind, bucket = value["kind"], value["bucket"]
            if not is_shard_name(value["shard"], kind):
                raise ValueError(f"{value['shard']} is no name of a shard with {kind}")
            if (bucket is None) != (kind == _PROMPTS):
                raise ValueError(f"bucket is {bucket!r:.40} for kind {kind!r}")
            check_fingerprint(value["fingerprint"])
            fields: dict[str, Any] = {name: value.get(name) for name in _SIDECAR_FIELDS}
            fields["bucket"] = bucket and bucket_of(bucket)
            return cls(**fields)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"sidecar: {path} lacks or misspells a field ({error}). {cure}"
            ) from error


def _matches(pattern: re.Pattern[str]) -> Fits:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_SIDECAR_FIELDS: Fields = {
    "shard": str,
    "kind": lambda value: value in (_SAMPLES, _PROMPTS),
    "sha256": _matches(_SHA256),
    "bytes": is_count,
    "count": is_count,
    "bucket": lambda value: value is None or is_bucket(value),
    "fingerprint": dict,
    "latent_rgb": lambda value: value is None or isinstance(value, dict),
}


def is_shard_name(name: object, kind: str) -> bool:
    """Whether it names a file of this kind in a cache's own folder: no path, nothing else."""
    found = SHARD_NAME.fullmatch(name) if isinstance(name, str) else None
    return found is not None and found[kind] is not None


def check_format(value: dict[str, Any], path: Path) -> None:
    """Raise UserError unless `value` was written in the format version that this code reads."""
    if value.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {value.get('format')!r}, this wandistill reads "
            f"{FORMAT_VERSION}. Encode again, or install the version that wrote the shards."
        )


def committed_shards(folder: Path) -> list[Sidecar]:
    """Every shard that exists, by name. Says nothing about whether the tar is undamaged."""
    tars = sorted(folder.glob("*.tar"))
    return [Sidecar.read(path) for tar in tars if (path := Sidecar.path_for(tar)).exists()]


def age(name: str) -> tuple[int, int]:
    """Sorts shards and tombstones by when they were begun: (number, writer).

    Of all that a cache says about one key, the newest counts.
    """
    found = _AGE.search(name)
    return (int(found["number"]), int(found["writer"])) if found else (-1, -1)


@dataclass(frozen=True, kw_only=True)
class Tombstones:
    """`tombstones-w000-00013.json`: these samples are dead in every shard that is older."""

    name: str
    sha256: str
    """Of the file."""
    keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, "keys": list(self.keys)}

    @classmethod
    def read(cls, path: Path) -> "Tombstones":
        """Raises UserError when the file is damaged: taken for empty it would revive samples."""
        cure = (
            "Restore it, or delete it, which brings the samples that it removed back, and remove "
            "them again: wanprep remove"
        )
        value = read_object(path, "shards", most=_MOST_TOMBSTONES, cure=cure)
        check_format(value, path)
        keys: Any = value.get("keys")
        if not is_list(keys, _matches(_KEY)):
            raise UserError(f"shards: {path} is damaged: its `keys` is no list of keys. {cure}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(name=path.name, sha256=digest, keys=tuple(keys))


def committed_tombstones(folder: Path) -> list[Tombstones]:
    """Every list of removed samples, by name."""
    return [Tombstones.read(path) for path in sorted(folder.glob(f"{TOMBSTONES}-*.json"))]


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """An opened cache. Columns are read on first use; row numbers are positions in key order."""

    store: Store
    fingerprint: Fingerprint
    digest: str
    """Of all shards' contents."""
    samples: int
    buckets: tuple[Bucket, ...]
    shards: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    """Size of each of `shards`."""
    prompt_shards: tuple[str, ...]
    column_sha256: dict[str, str]
    latent_rgb: LatentRgb | None
    """For previews without a VAE; None in caches that were encoded without it."""
    overlays: Mapping[str, "Overlay"] = field(default_factory=dict)
    """Member → where it is read instead (`shared.format.overlays`)."""

    def __len__(self) -> int:
        return self.samples

    @property
    def folder(self) -> Path:
        """The store's, here."""
        return self.store.folder

    def _column(self, name: str, least: int = 0, most: int | None = None) -> npt.NDArray[Any]:
        """A column as it was written; with `most`, refused unless its values are in this range."""
        try:
            values = read_column(self.folder / INDEX, name, self.samples)
        except Exception as error:  # not as ours are, or a lost chunk; zarr's many errors
            raise self._damaged(name, str(error)) from error
        if column_digest(values) != self.column_sha256.get(name):
            raise self._damaged(name, "its values are not those that were written")
        if most is None or not values.size:
            return values
        low, high = int(values.min()), int(values.max())
        if not least <= low <= high <= most:
            raise self._damaged(name, f"its values are {low} … {high}, expected {least} … {most}")
        return values

    def _damaged(self, column: str, why: str) -> UserError:
        return UserError(
            f"shards: column {column!r} of {self.store.shown(self.folder / INDEX)} is damaged "
            f"({why}). Rebuild it: wanprep index --shards {quoted(self.store)}"
        )

    @cached_property
    def keys(self) -> npt.NDArray[np.uint8]:
        """(N, 16) bytes, ascending, none twice."""
        keys = self._column("key")
        ordered = keys.view("S16").reshape(-1)
        if not bool((ordered[:-1] < ordered[1:]).all()):
            raise self._damaged("key", "its keys do not ascend")
        return keys

    @cached_property
    def captions(self) -> npt.NDArray[np.uint8]:
        """(N, 16) caption digests."""
        return self._column("caption")

    @cached_property
    def bucket_ids(self) -> npt.NDArray[np.int32]:
        """(N) positions in `buckets`."""
        return self._column("bucket", 0, len(self.buckets) - 1)

    @cached_property
    def shard_ids(self) -> npt.NDArray[np.int32]:
        """(N) positions in `shards`."""
        return self._column("shard", 0, len(self.shards) - 1)

    @cached_property
    def types(self) -> npt.NDArray[np.uint8]:
        return self._column("type", 0, len(MEDIA_TYPES) - 1)

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        return self._column("tokens", 0, MAX_TEXT_TOKENS)

    @cached_property
    def repeats(self) -> npt.NDArray[np.int32]:
        """How often an epoch shows each sample; 1 in caches that are older than the column."""
        if "repeats" not in self.column_sha256:
            return np.ones(len(self), dtype=np.int32)
        return self._column("repeats", 1, MOST_REPEATS)

    @cached_property
    def _states(self) -> npt.NDArray[np.int64]:
        """(N, 2) offset and length of the states; zeros in caches without."""
        if "states" not in self.column_sha256:
            return np.zeros((len(self), 2), dtype=np.int64)
        return self._column("states", 0, max(self.shard_bytes, default=0))

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(N, members)."""
        placed = self._column("offset", 0, max(self.shard_bytes, default=0))
        offsets = np.concatenate([placed, self._states[:, :1]], axis=1)
        room = np.asarray(self.shard_bytes, dtype=np.int64)[self.shard_ids]
        for begins, bytes_ in zip(offsets.T, self.lengths.T, strict=True):  # by member: less memory
            if bool((begins > room - bytes_).any()):
                raise self._damaged("offset", "members go beyond the end of their shard")
        return offsets

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N, members)."""
        placed = self._column("length", 0, max(self.shard_bytes, default=0))
        return np.concatenate([placed, self._states[:, 1:]], axis=1)

    def read_columns(self) -> Columns:
        """Read (and so check) every column now."""
        read: Columns = {
            "key": self.keys,
            "caption": self.captions,
            "bucket": self.bucket_ids,
            "shard": self.shard_ids,
            "type": self.types,
            "tokens": self.tokens,
            "repeats": self.repeats,
            "offset": self.offsets[:, :-1],
            "length": self.lengths[:, :-1],
            "states": self._states,
        }
        assert read.keys() == COLUMNS.keys()
        return read

    def key(self, row: int) -> str:
        return bytes(self.keys[row]).hex()

    def hex_keys(self) -> list[str]:
        """`key` of every row."""
        return hex_keys(self.keys)

    def as_on_disk(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """These rows in the order in which their samples lie in the shards."""
        return rows[np.lexsort((self.offsets[rows, 0], self.shard_ids[rows]))]

    def place(self, row: int, member: str) -> tuple[Path, int, int]:
        """Shard file, offset and length of a member's bytes; length 0 where there is none."""
        overlay = self.overlays.get(member)
        if overlay is not None and overlay.rows[row] >= 0:
            return overlay.index.place(int(overlay.rows[row]), member)
        column = MEMBERS.index(member)
        shard = self.folder / self.shards[int(self.shard_ids[row])]
        return shard, int(self.offsets[row, column]), int(self.lengths[row, column])

    def where(self, row: int, member: str = JSON_MEMBER) -> str:
        """Key of a sample and the shard file that holds the member, for messages."""
        return f"{self.store.shown(self.place(row, member)[0])}: sample {self.key(row)}"


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Shards in a folder of their own that bring one member of a cache's samples."""

    index: CacheIndex
    rows: npt.NDArray[np.int64]
    """(N) for the N samples of the cache: row in `index`, −1 where it does not have the sample."""

    @property
    def lacking(self) -> npt.NDArray[np.intp]:
        """Rows of the cache that it brings nothing for."""
        return np.flatnonzero(self.rows < 0)


def open_cache(store: Store) -> CacheIndex:
    """Open a cache for reading. Raises UserError with the command that repairs it."""
    folder = store.folder
    manifest_path = folder / MANIFEST
    rebuild = f"Rebuild it: wanprep index --shards {quoted(store)}"
    if not manifest_path.exists():
        has_tars = folder.is_dir() and any(folder.glob("*.tar"))
        make = f"Make shards first: wanprep encode --size 640 --output {quoted(store)}"
        raise UserError(f"shards: {store} has no {MANIFEST}. {rebuild if has_tars else make}")
    manifest = read_object(manifest_path, "shards", most=MOST_MANIFEST, cure=rebuild)
    check_format(manifest, manifest_path)
    try:
        attributes = read_attributes(folder / INDEX)
    except (OSError, ValueError) as error:
        raise UserError(
            f"shards: {store.shown(folder / INDEX)} is missing or damaged. {rebuild}"
        ) from error
    if attributes.get("digest") != manifest.get("index"):
        raise UserError(
            f"shards: {INDEX} (digest {attributes.get('digest')!r:.80}) does not belong to "
            f"{MANIFEST} (expects {manifest.get('index')!r:.80}); a run was interrupted between "
            f"them. {rebuild}"
        )
    try:
        require(manifest, _MANIFEST_FIELDS)
        check_fingerprint(manifest["fingerprint"])
        index = CacheIndex(
            store=store,
            fingerprint=manifest["fingerprint"],
            digest=manifest["index"],
            samples=manifest["samples"],
            buckets=tuple(bucket_of(bucket) for bucket in manifest["buckets"]),
            shards=tuple(entry["name"] for entry in manifest["shards"]),
            shard_bytes=tuple(entry["bytes"] for entry in manifest["shards"]),
            prompt_shards=tuple(entry["name"] for entry in manifest["prompts"]),
            column_sha256=attributes["sha256"],
            latent_rgb=LatentRgb.from_json(rgb) if (rgb := manifest.get("latent_rgb")) else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"shards: {manifest_path} lacks or misspells a field ({error}). {rebuild}"
        ) from error
    listed = (*index.shards, *index.prompt_shards)
    missing = [name for name in listed if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"shards: {manifest_path} lists {len(missing)} shard(s) that are gone, the first "
            f"{missing[0]}. Restore them, or leave them out: wanprep index --shards "
            f"{quoted(store)}"
        )
    store.will_read(dict(zip(index.shards, index.shard_bytes, strict=True)))
    return index


def _lists_shards(kind: str) -> Fits:
    """Of a manifest's list: whether it names shards of this kind, each with its size."""

    def is_entry(entry: Any) -> bool:
        return is_shard_name(entry["name"], kind) and is_count(entry["bytes"])

    return lambda value: is_list(value, is_entry)


_MANIFEST_FIELDS: Fields = {
    "index": str,
    "samples": is_count,
    "buckets": lambda value: is_list(value, is_bucket),
    "shards": _lists_shards(_SAMPLES),
    "prompts": _lists_shards(_PROMPTS),
    "fingerprint": dict,
}


@dataclass(frozen=True)
class MemberHeader:
    """A member whose tensors can be read: what its header says, found to be sound."""

    row: int
    member: str
    tensors: Mapping[str, TensorHeader]
    shard: Path
    offset: int
    """Where the member begins in the shard."""
    fetched: bytes | None
    """The whole member, where it comes from a store in one piece; else None."""


class MemberReader:
    """Reads single members of samples by byte range; keeps a few shard files open."""

    def __init__(self, index: CacheIndex, *, open_files: int = 32) -> None:
        self._index = index
        self._store = index.store
        """Of its overlays, too."""
        self._limit = open_files
        self._files: OrderedDict[Path, tuple[int, int]] = OrderedDict()  # descriptor, size

    def read(self, row: int, member: str) -> dict[str, torch.Tensor] | None:
        """Tensors of one member of sample `row`; None where the sample lacks that member.

        Raises UserError when the bytes are not what the index says.
        """
        data = self.raw(row, member)
        with self._damage_named(row, member):
            return unpack(data, member) if data else None

    def header(self, row: int, member: str) -> MemberHeader | None:
        """Shapes and dtypes of a member's tensors, to make room for them before `read_into`.

        None where the sample lacks the member. Raises UserError when the bytes are not what the
        index says.
        """
        shard, offset, length = self._index.place(row, member)
        if length == 0:
            return None
        data = self._store.fetched(shard, offset, length, small=False)
        with self._damage_named(row, member):
            if data is None:
                file = self._file_of(shard, offset + length)
                head = read_head(lambda size: os.pread(file, size, offset), length)
            tensors = tensors_in(head if data is None else data, length, member)
        return MemberHeader(row, member, tensors, shard, offset, data)

    def read_into(
        self, header: MemberHeader, name: str, target: torch.Tensor, *, first: int = 0
    ) -> None:
        """Read a tensor straight into `target`: contiguous, of just its shape and dtype; or as much
        of its first dimension as `target` has, from `first` on.

        Raises UserError when the bytes are not there.
        """
        tensor = header.tensors[name]
        assert target.shape[1:] == tensor.shape[1:] and target.dtype == TORCH_DTYPES[tensor.dtype]
        assert first + len(target) <= tensor.shape[0]
        room = memoryview(target.view(torch.uint8).numpy()).cast("B")
        place = tensor.begin + first * target[0].nbytes
        if header.fetched is not None:
            room[:] = memoryview(header.fetched)[place : place + len(room)]
            return
        begin, done = header.offset + place, 0
        with self._damage_named(header.row, header.member):
            descriptor = self._file_of(header.shard, begin + len(room))
            while done < len(room):  # 2 GiB is the most that one call gives
                got = os.preadv(descriptor, [room[done:]], begin + done)
                if not got:
                    raise ValueError(f"{done} of {len(room)} bytes could be read")
                done += got

    def info(self, row: int) -> dict[str, Any]:
        """`KEY.json` of sample `row`. Raises UserError when it is damaged."""
        data = self.raw(row, JSON_MEMBER)
        with self._damage_named(row, JSON_MEMBER):
            return unpack_info(data)

    def raw(self, row: int, member: str) -> bytes:
        """The bytes of one member of sample `row`; empty where the sample lacks that member."""
        shard, offset, length = self._index.place(row, member)
        if length == 0:
            return b""
        with self._damage_named(row, member):
            if member == JSON_MEMBER and length > MOST_INFO_BYTES:
                raise ValueError(f"{length} bytes, expected at most {MOST_INFO_BYTES}")
            data = self._store.fetched(shard, offset, length, small=member == JSON_MEMBER)
            if data is None:
                data = os.pread(self._file_of(shard, offset + length), length, offset)
            if len(data) < length:  # 2 GiB is the most that one call gives
                raise ValueError(f"{len(data)} of {length} bytes could be read")
            return data

    @contextmanager
    def _damage_named(self, row: int, member: str) -> Iterator[None]:
        """Whatever can't be read or understood becomes a UserError that names the sample."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"shards: {self._index.where(row, member)}: {member} is damaged ({error}). "
                f"{REENCODE_SHARD}"
            ) from error

    def _file_of(self, shard: Path, end: int) -> int:
        """Descriptor of a shard. Raises ValueError where it has fewer than `end` bytes."""
        if shard not in self._files:
            if len(self._files) >= self._limit:
                os.close(self._files.popitem(last=False)[1][0])
            # Not blocking: a pipe would be waited for.
            descriptor = self._store.open_shard(shard, os.O_RDONLY | os.O_NONBLOCK)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise ValueError("the shard is no regular file")
            self._files[shard] = descriptor, status.st_size
        self._files.move_to_end(shard)
        descriptor, size = self._files[shard]
        if end > size:
            raise ValueError(f"the shard has {size} bytes, the member would end at {end}")
        return descriptor

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1][0])
