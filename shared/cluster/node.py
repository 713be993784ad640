"""What actors check of the node that they are on, and say of themselves once they can work."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from shared.cluster.fleet import Joined
from shared.errors import UserError
from shared.io.durable import write_bytes
from shared.io.store import Store

_MARK = ".lock-ray"
"""File in the output folder that says which run writes there: whoever reads it sees the folder."""


def mark_output(output: Store, run: str) -> None:
    """Have the folder say that this run writes there."""
    write_bytes(output.folder / _MARK, run.encode())


def check_folders(folder: Path, output: Store, run: str) -> None:
    """Go where the driver runs, which relative paths begin at. UserError where the output folder is
    not the one that it marked."""
    with suppress(OSError):  # a node may lack it where all paths are absolute
        os.chdir(folder)
    mark = output.folder / _MARK
    if not mark.exists() or mark.read_text() != run:
        raise UserError(
            f"--output: {output} is not the folder there that it is where the command runs. "
            "Expected one that all nodes of the cluster share."
        )


@contextmanager
def errors_of_this_node() -> Iterator[None]:
    """UserErrors of the block say where it ran."""
    try:
        yield
    except UserError as error:
        raise UserError(f"node {socket.gethostname()}: {error}") from error


def joined(writer: int | None) -> Joined:
    """This process; `writer` is the number of its shards."""
    node = ray.get_runtime_context().get_node_id()
    return Joined(host=socket.gethostname(), node=node, pid=os.getpid(), writer=writer)
