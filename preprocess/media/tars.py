"""WebDataset tars of media: which tars there are, and where in them each sample's files lie.

Only headers are read here, and captions, as bytes: nothing is unpacked and nothing unpickled,
whatever a member is called. Decoders get a media file by its place in the tar
(`preprocess.media.sources`).
"""

import re
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from preprocess.frames.media_info import MediaError
from preprocess.media.remote import DataDir, here, in_home, remote_named
from preprocess.media.sources import MediaFile, TarMember
from shared.errors import UserError
from shared.format.cache import SHARD_NAME
from shared.io.hashing import stamp_of
from shared.io.names import as_name, exists, for_glob, has_wildcard, is_folder

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PATTERN = re.compile(r"[{*?]")
_MOST_TEXT_BYTES = 4 << 20
"""Of a caption, or of the JSON that holds it."""


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """Members of one tar that share their name up to the last dot."""

    key: str
    members: dict[str, TarMember]
    """By what follows that dot, in lower case."""
    twice: str | None
    """A name that occurs more than once; None where all differ."""

    def text(self, extension: str) -> bytes:
        """What a small member holds. Raises MediaError, or OSError."""
        member = self.members[extension]
        if member.length > _MOST_TEXT_BYTES:
            raise MediaError(f"{extension} has {member.length} bytes, too many for a caption")
        return b"".join(member.content())


def is_tars(data_dir: Path) -> bool:
    """Whether this names tars, one or by a pattern as `clips/{000..099}.tar`, and no folder."""
    return data_dir.name.lower().endswith((SUFFIX, *COMPRESSED)) and not is_folder(data_dir)


def base_folder(data_dir: DataDir) -> DataDir:
    """The folder that names are relative to: of a pattern, what stands before its first wildcard.

    A folder is its own. A part that is there by that very name is no wildcard.
    """
    if not isinstance(data_dir, Path) or not is_tars(data_dir):
        return data_dir
    fixed = Path()
    for part in data_dir.parent.parts:
        if _PATTERN.search(part) and not exists(fixed / part):
            break
        fixed /= part
    return fixed


def named_tars(pattern: Path) -> list[Path]:
    """The tars that a pattern stands for, in its order; braces name them, `*` and `?` find them.

    What is there by that very name stands for itself. Raises UserError where it finds none or
    cannot be understood.
    """
    if exists(pattern):
        return [pattern]
    base = here(base_folder(pattern))
    try:
        names = list(braceexpand(str(pattern.relative_to(base)), escape=False))
    except ValueError as error:
        raise UserError(
            f"--train-data-dir: {pattern} has braces that don't fit ({error}). Expected a pattern "
            "such as 'clips/{000..099}.tar'."
        ) from error
    found: list[Path] = []
    for name in names:
        path = base / name
        if has_wildcard(name) and not exists(path):
            with suppress(OSError):  # a part without a wildcard is too long for a name
                found += sorted(base.glob(for_glob(name)))
        else:
            found.append(path)
    if not found:
        raise UserError(
            f"dataset: no tar fits {pattern}. Set --train-data-dir (or DATASET_NAME) to a folder, "
            "a tar or a pattern such as 'clips/{000..099}.tar'."
        )
    return found


def tars_among(files: Iterable[Path]) -> list[Path]:
    """Tars of media, compressed ones too; shards that wandistill wrote are none."""
    names = (SUFFIX, *COMPRESSED)
    return [
        path
        for path in files
        if path.name.lower().endswith(names) and not SHARD_NAME.fullmatch(path.name)
    ]


@dataclass(frozen=True, kw_only=True)
class TarContent:
    """What lies in a tar, in its order."""

    samples: tuple[TarSample, ...]
    special: tuple[str, ...] = ()
    """Links, devices, sparse files: what does not lie in it in one piece."""
    hidden: tuple[str, ...] = ()
    """For each hidden member what hides it."""
    problem: str | None = None
    """Why what follows can't be read; None: all is."""


def read_tar(
    tar: Path, *, caption_suffix: str, hidden_part: Callable[[str], str | None]
) -> TarContent:
    """The members of a tar by what they belong to.

    `caption_suffix`, as ".txt", may have several dots.
    """
    if tar.name.lower().endswith(COMPRESSED):
        return TarContent(
            samples=(),
            problem="a compressed tar can only be read from its beginning; unpack it to a plain "
            "one: gunzip (media hardly get smaller by it)",
        )
    members, special, problem = _members(tar)
    named: dict[str, dict[str, TarMember]] = {}
    twice: dict[str, str] = {}
    hidden: list[str] = []
    for member in members:
        if hides := hidden_part(member.name):
            hidden.append(hides)
            continue
        key, ending = _split(member.name, caption_suffix.lower())
        fields = named.setdefault(key, {})
        if ending in fields:
            twice[key] = member.name
        fields[ending] = member
    return TarContent(
        samples=tuple(
            TarSample(key=key, members=fields, twice=twice.get(key))
            for key, fields in named.items()
        ),
        special=tuple(special),
        hidden=tuple(hidden),
        problem=problem,
    )


def _split(name: str, caption_suffix: str) -> tuple[str, str]:
    """(key, ending in lower case) of a member's name; the latter "" where it has no dot."""
    lower = name.lower()
    if lower.endswith(caption_suffix) and not lower.endswith(f"/{caption_suffix}"):
        return name[: -len(caption_suffix)], caption_suffix.removeprefix(".")
    ending = PurePosixPath(name).suffix
    return name.removesuffix(ending), ending.removeprefix(".").lower()


# What tarfile raises on bytes that are no tar, beside its own error.
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError)


class _Header(tarfile.TarInfo):
    """A header that never leads back: older Pythons read one of negative size for ever
    (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.HeaderError("a size below zero")
        return -(-count // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _members(tar: Path) -> tuple[list[TarMember], list[str], str | None]:
    """Files of a tar that lie in it in one piece, names of others, and why there are no more."""
    found: list[TarMember] = []
    special: list[str] = []
    try:
        size = tar.stat().st_size
        with (
            tar.open("rb") as stream,
            tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as archive,
        ):
            for header in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps every header
                if not header.isreg() or header.issparse():
                    if not header.isdir():
                        special.append(header.name)
                    continue
                if header.offset_data + header.size > size:
                    return found, special, f"the tar ends inside {header.name}: it is truncated"
                found.append(
                    TarMember(
                        tar=tar,
                        name=header.name,
                        offset=header.offset_data,
                        length=header.size,
                    )
                )
    except FileNotFoundError:
        return found, special, "there is no such file"
    except _TAR_ERRORS as error:
        whole = f" after {len(found)} files" if found else ""
        return found, special, f"the tar is damaged{whole} ({error})"
    return found, special, None


def media_named(data_dir: DataDir, name: str) -> MediaFile:
    """The media file that a dataset or a cache calls `name`: in a store, a tar or of its own."""
    remote = remote_named(data_dir, name)
    if remote is not None:
        return remote
    found = media_at(here(data_dir) / given_path(data_dir, name))
    if as_name(name) == name or not isinstance(found, Path) or exists(found):
        return found
    return media_at(here(data_dir) / given_path(data_dir, as_name(name)))


def given_path(data_dir: DataDir, name: str) -> Path:
    """The path that a dataset in `data_dir` means by `name`."""
    return Path(name).expanduser() if in_home(here(data_dir), name) else Path(name)


def media_at(path: Path) -> MediaFile:
    """The media file of a path that may lead into a tar: `clips/000.tar/KEY.mp4`."""
    for parent in reversed(path.parents):
        if parent.suffix.lower() == SUFFIX and parent.is_file():
            members = _by_name(parent, stamp_of(parent))
            return members.get(path.relative_to(parent).as_posix(), path)
    return path


def member_name(member: TarMember) -> str:
    """The name of a member as part of a path, without `./` and the like in front."""
    return PurePosixPath(member.name.lstrip("/")).as_posix()


@lru_cache(maxsize=16)
def _by_name(tar: Path, stamp: str) -> dict[str, TarMember]:
    """Remembered for as long as the tar has this stamp."""
    return {member_name(member): member for member in _members(tar)[0]}
