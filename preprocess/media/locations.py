"""What the options of stage one take: folders, and URLs of object stores.

A cache is written through a mirror of this rank's own.
"""

from pathlib import Path

import typer

from preprocess.cache.ranks import this_rank
from shared.errors import UserError
from shared.io.mirror import ROWS_SUFFIX, local_folder, mirror_of


def shards_folder(location: str | Path) -> Path:
    """What `--output` and `--shards` take: a folder as it is, a URL as its mirror's folder."""
    try:
        return open_for_writing(location, writer=this_rank().number)
    except UserError as error:  # a ValueError, of which the command line would show the value alone
        raise typer.BadParameter(str(error)) from error


def media_folder(location: str | Path) -> Path:
    """What `--train-data-dir` takes: a folder as it is, a URL as the folder that lists it."""
    from preprocess.media import remote

    return remote.media_folder(location)


def metadata_file(location: str | Path) -> Path:
    """What `--train-data-meta` takes: a file as it is, a URL as a copy of it."""
    from preprocess.media import remote

    return remote.metadata_file(location)


def open_for_writing(location: str | Path, *, writer: int) -> Path:
    """The folder through which the writer of this number fills a cache; `pull_mirrors` comes next.

    A process may open several, each for a number of its own.
    """
    folder = local_folder(location, writer=writer)
    mirror = mirror_of(folder)
    if mirror is not None:
        mirror.before_sidecar = _put_rows
    return folder


def _put_rows(written: Path, final: Path) -> None:
    """Write the shard's rows beside it, so that no other machine must fetch it for the index."""
    from preprocess.cache.shard_rows import pack_rows, scan_shard
    from shared.format.cache import Sidecar
    from shared.io.durable import write_bytes

    sidecar = Sidecar.read(written, final=final)
    if sidecar.kind == "samples":
        columns = scan_shard(final.parent, sidecar)
        write_bytes(final.with_suffix(ROWS_SUFFIX), pack_rows(columns, sidecar.sha256))
