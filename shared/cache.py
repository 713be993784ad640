"""Reading a cache: sidecars, `manifest.json`, `index.zarr`, members by byte range, the prompt bank.

Tars and sidecars are the truth. Manifest and index are derived from them by `wanprep index`
(`preprocess/index.py`); the layouts that both sides must agree on are the constants here.
"""

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import webdataset
import zarr
from safetensors import SafetensorError

from shared.buckets import Bucket
from shared.errors import UserError
from shared.fingerprint import FORMAT_VERSION, Fingerprint
from shared.latent_rgb import LatentRgb
from shared.model_spec import read_json
from shared.schema import JSON_MEMBER, MEMBERS, TEXT_MEMBER, unpack

# h480-w832-f81-w000-00012.tar: bucket, writer, number; tombstones-w000-00013.json counts on.
_KEY = re.compile(r"[0-9a-f]{32}")
_AGE = re.compile(r"-w(?P<writer>\d+)-(?P<number>\d+)\.(?:tar|json)$")

REENCODE_SHARD = (
    "Restore the shard, or delete it with its sidecar and run `wanprep encode` again (in a folder "
    "captions or conditions: `wanprep recaption` or `add-condition`)."
)
MANIFEST = "manifest.json"
INDEX = "index.zarr"
TOMBSTONES = "tombstones"
MEDIA_TYPES = ("video", "image", "text")

# index.zarr: column → (dtype, values per row). A row is one live sample; rows are sorted by key, so
# that what is trained on does not depend on how an encode was cut into shards.
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "key": ("uint8", (16,)),
    "caption": ("uint8", (16,)),  # first 16 bytes of SHA-256 of the caption's UTF-8
    "bucket": ("int32", ()),
    "shard": ("int32", ()),
    "type": ("uint8", ()),  # position in MEDIA_TYPES
    "tokens": ("int32", ()),
    "repeats": ("int32", ()),  # how often an epoch shows the sample
    "offset": ("int64", (len(MEMBERS),)),  # of each member's bytes in the tar, in MEMBERS' order
    "length": ("int64", (len(MEMBERS),)),  # 0 where the sample has no such member
}


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
        bucket = self.bucket and {
            "height": self.bucket.height,
            "width": self.bucket.width,
            "frames": self.bucket.frames,
        }
        return {"format": FORMAT_VERSION, **self.__dict__, "bucket": bucket}

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """Raises UserError when the file is damaged or of another format version."""
        value = read_json(path, "sidecar")
        check_format(value, path)
        try:
            bucket = value["bucket"] and Bucket(**value["bucket"])
            if (bucket is None) != (value["kind"] != "samples"):
                raise TypeError(f"bucket is {bucket} for kind {value['kind']!r}")
            if not isinstance(value["fingerprint"], dict):
                raise TypeError("fingerprint is no object")
            latent_rgb = value.get("latent_rgb")  # older shards have none
            own = cls.__dataclass_fields__.keys() - {"bucket", "latent_rgb"}
            fields = {name: value[name] for name in own}
            return cls(**fields, bucket=bucket, latent_rgb=latent_rgb)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"sidecar: {path} lacks or misspells a field ({error}). If its tar is whole, "
                "delete the sidecar and the tar and run `wanprep encode` again."
            ) from error


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
        value = read_json(path, "shards")
        check_format(value, path)
        keys = value.get("keys")
        if not isinstance(keys, list) or not all(
            isinstance(key, str) and _KEY.fullmatch(key) for key in keys
        ):
            raise UserError(
                f"shards: {path} is damaged: its `keys` is no list of keys. Restore it, or delete "
                "it, which brings the samples that it removed back, and remove them again: wanprep "
                "remove"
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(name=path.name, sha256=digest, keys=tuple(keys))


def committed_tombstones(folder: Path) -> list[Tombstones]:
    """Every list of removed samples, by name."""
    return [Tombstones.read(path) for path in sorted(folder.glob(f"{TOMBSTONES}-*.json"))]


def column_digest(values: npt.NDArray[Any]) -> str:
    """SHA-256 (hex) of a column's values, row by row, little-endian."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(little)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """An opened cache. Columns are read on first use; row numbers are positions in key order."""

    folder: Path
    fingerprint: Fingerprint
    digest: str
    """Of all shards' contents."""
    buckets: tuple[Bucket, ...]
    shards: tuple[str, ...]
    prompt_shards: tuple[str, ...]
    column_sha256: dict[str, str]
    latent_rgb: LatentRgb | None
    """For previews without a VAE; None in caches that were encoded without it."""
    overlays: Mapping[str, "Overlay"] = field(default_factory=dict)
    """Member → where it is read instead (`shared.overlays`)."""

    def __len__(self) -> int:
        return len(self.bucket_ids)

    def _column(self, name: str) -> npt.NDArray[Any]:
        try:
            values = np.asarray(zarr.open_group(self.folder / INDEX, mode="r")[name][:])  # type: ignore[index]
        except Exception as error:  # a damaged chunk: zarr's and its codecs' many errors
            raise self._damaged(name, str(error)) from error
        if column_digest(values) != self.column_sha256.get(name):
            raise self._damaged(name, "its values are not those that were written")
        return values

    def _damaged(self, column: str, why: str) -> UserError:
        return UserError(
            f"shards: column {column!r} of {self.folder / INDEX} is damaged ({why}). "
            f"Rebuild it: wanprep index --shards {self.folder}"
        )

    def _positions(self, column: str, listed: tuple[Any, ...]) -> npt.NDArray[np.int32]:
        """A column of positions in one of the manifest's lists."""
        positions = self._column(column)
        if len(positions) and int(positions.max()) >= len(listed):
            raise self._damaged(column, f"it goes beyond the {len(listed)} that {MANIFEST} lists")
        return positions

    @cached_property
    def keys(self) -> npt.NDArray[np.uint8]:
        """(N, 16) bytes."""
        return self._column("key")

    @cached_property
    def captions(self) -> npt.NDArray[np.uint8]:
        """(N, 16) caption digests."""
        return self._column("caption")

    @cached_property
    def bucket_ids(self) -> npt.NDArray[np.int32]:
        return self._positions("bucket", self.buckets)

    @cached_property
    def shard_ids(self) -> npt.NDArray[np.int32]:
        return self._positions("shard", self.shards)

    @cached_property
    def types(self) -> npt.NDArray[np.uint8]:
        return self._column("type")

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        return self._column("tokens")

    @cached_property
    def repeats(self) -> npt.NDArray[np.int32]:
        """How often an epoch shows each sample; 1 in caches that are older than the column."""
        if "repeats" not in self.column_sha256:
            return np.ones(len(self), dtype=np.int32)
        return self._column("repeats")

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(N, members)."""
        return self._column("offset")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N, members)."""
        return self._column("length")

    def read_columns(self) -> dict[str, npt.NDArray[Any]]:
        """Read (and so check) every column now."""
        return {column: self._column(column) for column in COLUMNS}

    def key(self, row: int) -> str:
        return bytes(self.keys[row]).hex()

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
        return f"{self.place(row, member)[0]}: sample {self.key(row)}"


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


def open_cache(folder: Path) -> CacheIndex:
    """Open a cache for reading. Raises UserError with the command that repairs it."""
    manifest_path = folder / MANIFEST
    if not manifest_path.exists():
        has_tars = folder.is_dir() and any(folder.glob("*.tar"))
        raise UserError(
            f"shards: {folder} has no {MANIFEST}. "
            + (
                f"Rebuild it: wanprep index --shards {folder}"
                if has_tars
                else f"Make shards first: wanprep encode --size 640 --output {folder}"
            )
        )
    rebuild = f"Rebuild it: wanprep index --shards {folder}"
    manifest = read_json(manifest_path, "shards")
    check_format(manifest, manifest_path)
    try:
        attributes = zarr.open_group(folder / INDEX, mode="r").attrs.asdict()
    except Exception as error:
        raise UserError(f"shards: {folder / INDEX} is missing or damaged. {rebuild}") from error
    if attributes.get("digest") != manifest.get("index"):
        raise UserError(
            f"shards: {INDEX} (digest {attributes.get('digest')}) does not belong to {MANIFEST} "
            f"(expects {manifest.get('index')}); a run was interrupted between them. {rebuild}"
        )
    try:
        index = CacheIndex(
            folder=folder,
            fingerprint=manifest["fingerprint"],
            digest=manifest["index"],
            buckets=tuple(
                Bucket(b["height"], b["width"], b["frames"]) for b in manifest["buckets"]
            ),
            shards=tuple(s["name"] for s in manifest["shards"]),
            prompt_shards=tuple(s["name"] for s in manifest["prompts"]),
            column_sha256=dict(attributes["sha256"]),  # type: ignore[arg-type]
            latent_rgb=LatentRgb.from_json(rgb) if (rgb := manifest.get("latent_rgb")) else None,
        )
        if not isinstance(index.fingerprint, dict):
            raise TypeError("fingerprint is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"shards: {manifest_path} lacks or misspells a field ({error}). {rebuild}"
        ) from error
    listed = (*index.shards, *index.prompt_shards)
    missing = [name for name in listed if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"shards: {manifest_path} lists {len(missing)} shard(s) that are gone, the first "
            f"{missing[0]}. Restore them, or leave them out: wanprep index --shards {folder}"
        )
    return index


class MemberReader:
    """Reads single members of samples by byte range; keeps a few shard files open."""

    def __init__(self, index: CacheIndex, *, open_files: int = 32) -> None:
        self._index = index
        self._limit = open_files
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def read(self, row: int, member: str) -> dict[str, torch.Tensor] | None:
        """Tensors of one member of sample `row`; None where the sample lacks that member.

        Raises UserError when the bytes are not what the index says.
        """
        data = self.raw(row, member)
        try:
            return unpack(data) if data else None
        except SafetensorError as error:
            raise self._damaged(row, member, error) from error

    def info(self, row: int) -> dict[str, Any]:
        """`KEY.json` of sample `row`. Raises UserError when it is damaged."""
        try:
            value = json.loads(self.raw(row, JSON_MEMBER))
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
        except ValueError as error:  # UserError is one: it says enough itself
            raise (
                error if isinstance(error, UserError) else self._damaged(row, JSON_MEMBER, error)
            ) from error
        return value

    def raw(self, row: int, member: str) -> bytes:
        """The bytes of one member of sample `row`; empty where the sample lacks that member."""
        shard, offset, length = self._index.place(row, member)
        if length == 0:
            return b""
        try:
            return os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            raise self._damaged(row, member, error) from error

    def _damaged(self, row: int, member: str, error: Exception) -> UserError:
        return UserError(
            f"shards: {self._index.where(row, member)}: {member} is damaged ({error}). "
            f"{REENCODE_SHARD}"
        )

    def _descriptor(self, shard: Path) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= self._limit:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = os.open(shard, os.O_RDONLY)
        return self._descriptors[shard]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


@dataclass(frozen=True)
class Prompt:
    """An entry of the prompt bank."""

    role: str
    prompt: str
    text: torch.Tensor
    """(tokens, D) at the prompt's true length."""


def read_prompts(folder: Path, shards: tuple[str, ...]) -> list[Prompt]:
    """The prompt bank, oldest first; where a role has one prompt only, the last entry counts.

    Raises UserError naming a damaged tar.
    """
    prompts = []
    for name in shards:
        # Raw bytes, never `.decode()`: its default handlers would unpickle a hostile member.
        # A list, because braces in a plain string would be expanded.
        path = folder / name
        dataset = webdataset.WebDataset(
            [str(path)],
            shardshuffle=False,
            empty_check=False,
            nodesplitter=None,  # every rank reads it all
        )
        try:
            for sample in dataset:
                info = json.loads(sample[JSON_MEMBER])
                text = unpack(sample[TEXT_MEMBER])["text"]
                prompts.append(Prompt(info["role"], info["prompt"], text))
        except Exception as error:  # tar, JSON and safetensors errors, and a missing member
            raise UserError(
                f"shards: {path} is damaged ({type(error).__name__}: {error}). Restore it, or "
                f"delete it together with {Sidecar.path_for(path).name} and run `wanprep encode` "
                "again."
            ) from error
    return prompts
