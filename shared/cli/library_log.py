"""What libraries log and warn of: errors to the terminal, the rest to a file of the run.

Their lines would come between ours, some of them on stdout, where our JSON is.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.io.names import without_secrets

LOG_FILE = "log.txt"
_FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


def quiet_libraries() -> None:
    """Only errors reach the terminal. Called before the libraries are imported.

    accelerate imports DeepSpeed wherever it is installed, and that tells which accelerator it
    found.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # the variables by which users choose more
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    logging.captureWarnings(True)
    # Its handler writes to stdout, and it has no variable for that.
    logging.getLogger("DeepSpeed").addFilter(_only_errors)


def _only_errors(record: logging.LogRecord) -> bool:
    """For a logger that keeps its records from the root, which so gets what is left out."""
    if record.levelno >= logging.ERROR:
        return True
    logging.getLogger().handle(record)
    return False


class _Lines(logging.Formatter):
    """Libraries name the addresses that they were given by environment, as of a proxy."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


@contextmanager
def library_log(folder: Path) -> Iterator[None]:
    """A block in which what libraries log and warn of is added to `folder`/log.txt.

    The file appears with the first line.
    """
    file = logging.FileHandler(folder / LOG_FILE, delay=True)
    file.setFormatter(_Lines(_FORMAT))
    terminal = logging.StreamHandler()  # a root with handlers has no last resort
    terminal.setFormatter(_Lines())
    terminal.setLevel(logging.ERROR)
    root = logging.getLogger()
    try:
        for handler in (file, terminal):
            root.addHandler(handler)
        yield
    finally:
        for handler in (file, terminal):
            root.removeHandler(handler)
            handler.close()
