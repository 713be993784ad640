"""Where a cache lives: a folder of this machine, or an object store behind one (`mirror.Mirror`).

Who writes, changes or reads a cache has its store. What counts in it is committed and removed
through the store; files of passing use in the folder (locks, temporary names, waiting embeddings)
are nobody else's business.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from shared.errors import UserError
from shared.io import durable


class Place:
    """What lies here in a folder or file, and is called something else by users: its `str`."""

    folder: Path

    def shown(self, text: object) -> str:
        """A text for users: the name in place of the folder here."""
        return str(text).replace(str(self.folder), str(self))


@contextmanager
def errors_named(*places: Place) -> Iterator[None]:
    """UserErrors of the block name these places as users do."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for place in places:
            text = place.shown(text)
        error.args = (text,)
        raise


@dataclass(frozen=True)
class Store(Place):
    """A cache's folder on this machine, which needs nothing but itself."""

    folder: Path

    is_remote: ClassVar[bool] = False
    """Whether the folder stands for objects that are elsewhere."""

    def __str__(self) -> str:
        return str(self.folder)

    def below(self, name: str) -> "Store":
        """A cache in a folder of it, such as `conditions`."""
        return replace(self, folder=self.folder / name)

    # What changes it. Raises OSError where that can't be done.

    def rename(self, written: Path, final: Path) -> None:
        """`durable.rename` of a file or folder that is whole under a temporary name."""
        durable.rename(written, final)

    def commit(self, written: Path, final: Path) -> None:
        """`durable.commit` of a file."""
        durable.fsync_file(written)
        self.rename(written, final)
        durable.fsync_folder(final.parent)

    def remove(self, path: Path) -> None:
        """Delete a file if it is there."""
        durable.remove(path)

    # What reads it. Shards are named by their place in the folder.

    def pull(self) -> None:
        """Make the folder like what it stands for. Raises UserError where that can't be read."""

    @contextmanager
    def pulled(self) -> Iterator["Store"]:
        """It, as it is now; UserErrors of the block name it as the user did."""
        with errors_named(self):
            self.pull()
            yield self

    def will_read(self, shards: Mapping[str, int]) -> None:
        """These are about to be read: name → bytes."""

    def described(self) -> list[str]:
        """A line on where shards are read from; none of a folder."""
        return []

    def shard_file(self, tar: Path) -> Path:
        """The file that holds a shard's bytes. Raises UserError where they can't be had."""
        return tar

    def open_shard(self, tar: Path, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a shard's bytes. Raises OSError, or UserError as `shard_file` does."""
        return os.open(tar, flags)

    def fetched(self, tar: Path, offset: int, length: int, *, small: bool) -> bytes | None:
        """Some bytes of a shard that are best read without the rest: `small` ones, or of a shard
        that there is no room for. None: read `open_shard`. Raises UserError.
        """
        return None
