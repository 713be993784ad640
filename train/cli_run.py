"""What every command that trains does with its prepared run."""

import sys

from rich.console import Console

from shared.cli_support import echo, say
from train.loop import train
from train.run import Run, resolved_configuration


def carry_out(run: Run, *, dry_run: bool) -> None:
    """Train, or print what would be done. Exits with 128 + the signal that stopped it."""
    if dry_run:
        echo(resolved_configuration(run))
        for line in run.describe():
            echo(line)
        return
    console = Console(stderr=True)
    stopped_by = train(run, console)
    if stopped_by is not None:
        say(
            console,
            "stopped  by a signal; go on with the same command and --resume-from-checkpoint latest",
        )
        sys.exit(128 + stopped_by)
