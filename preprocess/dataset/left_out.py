"""What of a dataset is no sample, and the lines that account for everything that was found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from shared.cli.console import count, named

HIDDEN = "hidden, trash, or a system's own"
STRAY_CAPTION = "captions without a media file"
OTHER = "neither media nor captions"
POSTER = "pictures named like a video, which has the caption"
FURTHER = "more media of a tar's sample, which has the caption"
SPECIAL = "links and special files in tars"

# What systems, NAS and archivers leave beside data, where no dot says so.
_SYSTEM = frozenset(
    (
        *("$recycle.bin", "#recycle", "@recycle", "network trash folder", "lost+found"),
        *("@eadir", "#snapshot", "@recently-snapshot", "__macosx", "temporary items"),
        *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file that lies there and is, by rule, no part of the dataset."""

    source: str
    """The file; of what is hidden the outermost folder that hides it."""
    reason: str
    """One of the above, or `not_of`: files of equal reason are named together."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many things a reader found in one place, each counted once."""

    origin: str
    noun: str
    """What is counted: a file, where captions and what else belongs to a media file are counted
    with it; or an entry of a list."""
    found: int
    used: int
    """The rest was rejected, or left out."""
    rejected: int

    @property
    def left_out(self) -> int:
        return self.found - self.used - self.rejected


def not_of(kind: str) -> str:
    """Why media are left out where only this kind is asked for."""
    return f"not {kind}s"


def hidden_part(name: str) -> str | None:
    """What hides a path, as seen from a dataset's folder or in a tar: the path up to a name with a
    dot in front, or to one of a system's own; None: nothing does."""
    path = PurePosixPath(name)
    for number, part in enumerate(path.parts, start=1):
        if (part.startswith(".") and part != "..") or part.casefold() in _SYSTEM:
            return str(PurePosixPath(*path.parts[:number]))
    return None


def account(tallies: Sequence[Tally], left_out: Sequence[LeftOut]) -> Iterator[str]:
    """A line for each place: found = used + rejected + left out; then one for each reason."""
    for tally in tallies:
        where = f"{tally.origin}: " if len(tallies) > 1 else ""
        yield (
            f"found    {where}{count(tally.found, tally.noun)}: {tally.used} used, "
            f"{tally.rejected} rejected, {tally.left_out} left out"
        )
    by_reason: dict[str, list[str]] = {}
    for one in left_out:
        by_reason.setdefault(one.reason, []).append(one.source)
    for reason, sources in by_reason.items():
        yield f"left out {len(sources)} ({reason}): {named(list(dict.fromkeys(sources)))}"
