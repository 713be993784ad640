"""Taking samples out of a cache: which ones, by key, by the name of their file, by a dataset."""

import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from shared.cache.index import fresh_index
from shared.cache.writer import ShardWriter, output_lock, refusals_explained
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader, committed_shards
from shared.format.schema import JSON_MEMBER, MEDIA_TYPES, MEMBERS, MOST_INFO_BYTES, unpack_info
from shared.format.tar import members
from shared.io.names import as_text, has_wildcard, matcher, quoted
from shared.io.store import Store


def require_shards(store: Store) -> None:
    """UserError where there is no cache, so that no folder is made by looking for one."""
    if not store.folder.is_dir() or not committed_shards(store.folder):
        raise UserError(
            f"--shards: no shards in {store}. Make some: wanprep encode --output {quoted(store)}"
        )


def sources(index: CacheIndex, rows: Iterable[int]) -> dict[str, str]:
    """Key → `source` of some rows, from the shards themselves."""
    with closing(MemberReader(index)) as reader:
        return {index.key(row): str(reader.info(row)["source"]) for row in rows}


def unlisted(index: CacheIndex, live: Collection[str], unusable: Collection[str]) -> list[str]:
    """Keys of the cache that are not `live`.

    Samples of `unusable` files, or in `unusable` tars, are left alone: a disk that is not mounted
    today is no reason to throw away what was encoded from it.
    """
    rows = [row for row, key in enumerate(index.hex_keys()) if key not in live]
    found = sources(index, rows).items()
    return [key for key, source in found if not is_unusable(source, unusable)]


def is_unusable(source: str, unusable: Collection[str]) -> bool:
    """Whether a sample's file is among these names, or what it lies in.

    Of a tar's member its tar may be what is named, or its sample: `x.tar/KEY` of `x.tar/KEY.mp4`.
    """
    at = PurePosixPath(source)
    cuts = [place for place, letter in enumerate(at.name) if letter == "." and place]
    of_samples = (str(at.with_name(at.name[:cut])) for cut in cuts)
    return any(name in unusable for name in (source, *map(str, at.parents), *of_samples))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The samples that names stand for."""

    sources: dict[str, str]
    """Key → source."""
    notes: tuple[str, ...]
    """What a user may not expect of his names, a line each."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What `remove` found, or took out."""

    sources: dict[str, str]
    """Key → source."""
    index: CacheIndex
    """Of the cache as it is now."""


def remove(
    store: Store,
    wanted: Sequence[str],
    *,
    dry_run: bool,
    announce: Callable[[Chosen], None] = lambda chosen: None,
) -> Removed:
    """Take samples out of the cache, by keys, names of their files, or patterns of names.

    `announce` is told which before anything is written; what it raises stops the removal. Nothing
    is written in a dry run, and nothing where one of the names fits no sample (UserError).
    """
    require_shards(store)
    with output_lock(store.folder):
        with refusals_explained(store.folder, "Nothing was removed."):
            index = fresh_index(store)
        chosen = choose(index, wanted)
        announce(chosen)
        if not dry_run:
            with refusals_explained(store.folder, "Nothing was removed."):
                writer = ShardWriter(store, index.fingerprint, shard_bytes=1)
                writer.add_tombstones(chosen.sources)
            rebuild = f"wanprep index --shards {quoted(store)}"
            kept = f"The samples are removed, the index is old: {rebuild}"
            with refusals_explained(store.folder, kept):
                index = fresh_index(store)
    return Removed(sources=chosen.sources, index=index)


def choose(index: CacheIndex, wanted: Sequence[str]) -> Chosen:
    """The samples that these names stand for.

    A name is a key, else the file of that very name with all of its samples, else, where it has
    `*` or `?` and no file was ever called so, a pattern. Captions without a medium have no name:
    only keys stand for them. Raises UserError for a name that fits no sample.
    """
    wanted = [as_text(name) for name in wanted]
    rows = {key: row for row, key in enumerate(index.hex_keys())}
    if all(name in rows for name in wanted):
        names = sources(index, [rows[name] for name in wanted])
    else:
        names = sources(index, rows.values())
    keys: dict[str, list[str]] = {}
    for key, source in names.items():
        if source:
            keys.setdefault(source, []).append(key)
    chosen: dict[str, str] = {}
    notes: list[str] = []
    for name in dict.fromkeys(wanted):
        if name in rows:
            fits = [name]
        elif name in keys:
            fits = keys[name]
            notes += _notes(name, keys)
        elif has_wildcard(name) and name in gone_files(index):
            raise UserError(
                f"remove: {name!r} is a file whose samples are out of {index.store} already, or "
                "that was rejected; it is not taken for a pattern. Nothing was removed. After "
                "wanprep compact, and a run that does not reject it, it is one again."
            )
        elif has_wildcard(name):
            is_fit = matcher(name)
            fits = [key for source, of_file in keys.items() if is_fit(source) for key in of_file]
        else:
            fits = []
        if not fits:
            raise _fits_nothing(index, name, keys)
        chosen |= {key: names[key] for key in fits}
    return Chosen(sources=chosen, notes=tuple(notes))


def gone_files(index: CacheIndex) -> set[str]:
    """Names of files that have had samples in shards that are still there, or that were rejected.

    A name that was removed must not become a pattern for others when the command is run again.
    """
    alive = np.bincount(index.shard_ids, minlength=len(index.shards))
    count = dict(zip(index.shards, alive, strict=True))
    names: set[str] = set()
    for sidecar in committed_shards(index.folder):
        if sidecar.kind == "prompts" or count.get(sidecar.shard, 0) >= sidecar.count:
            continue
        with index.store.shard_file(index.folder / sidecar.shard).open("rb") as stream:
            for member in members(stream, os.fstat(stream.fileno()).st_size, MEMBERS):
                if member.suffix == JSON_MEMBER:
                    info = unpack_info(member.read(stream, MOST_INFO_BYTES + 1))
                    names.add(info["source"])
    for listed in index.folder.glob("rejected*.jsonl"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            names |= {json.loads(line)["source"] for line in listed.read_text().splitlines()}
    return names


def _notes(name: str, keys: Mapping[str, Sequence[str]]) -> list[str]:
    """What to say of a name that is a file's."""
    notes = []
    if (samples := len(keys[name])) > 1:
        notes.append(f"{name!r} has {samples} samples: one for each clip, variant and caption")
    if has_wildcard(name):
        is_fit = matcher(name)
        others = sum(is_fit(source) for source in keys) - 1
        if others:
            files = "1 other file" if others == 1 else f"{others} other files"
            notes.append(
                f"{name!r} is the name of a file, so no pattern: {files} that it fits stay"
            )
    return notes


def _fits_nothing(index: CacheIndex, name: str, keys: Mapping[str, Sequence[str]]) -> UserError:
    said = f"remove: {name!r} is no key and fits no source of the {len(index)} samples in "
    said += f"{index.store}. Nothing was removed. "
    same = unicodedata.normalize("NFC", name)
    looks = next((s for s in keys if s != name and unicodedata.normalize("NFC", s) == same), None)
    if looks is not None:
        return UserError(
            f"{said}A source that looks the same is made of other characters (Unicode's composed "
            f"and decomposed forms): {looks!a}, found {name!a}. Name it by its key: "
            f"{', '.join(keys[looks])}"
        )
    return UserError(
        f"{said}Sources are named as in the dataset, e.g. {_example(index)!r}; only * and ? stand "
        "for other characters: quote them, so that the shell leaves them alone."
    )


def _example(index: CacheIndex) -> str:
    media = np.flatnonzero(index.types != MEDIA_TYPES.index("text"))  # the others have no source
    return next(iter(sources(index, map(int, media[:1])).values()), "clips/a.mp4")
