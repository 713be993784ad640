"""What every command that trains does with its prepared run."""

import sys
from collections.abc import Callable

from rich.console import Console

from shared.cli.support import echo, say
from train.distributed.launcher import end_with_launcher, launch, own_command
from train.loop import train, validation_of
from train.run import Run, estimate, resolved_configuration


def train_it(run: Run, console: Console) -> None:
    """Train. Exits with 128 + the signal that stopped it."""
    stopped_by = train(run, console)
    if stopped_by is not None:
        if run.ranks.first:
            resume = "resume with the same command and --resume-from-checkpoint latest"
            say(console, f"stopped  by a signal; {resume}")
        sys.exit(128 + stopped_by)


def carry_out(run: Run, do: Callable[[Run, Console], None] = train_it) -> None:
    """Train (or `do` something else) in all processes of the run, or print what would be done."""
    dry_run, to_launch = run.config.dry_run, run.placement.to_launch
    if dry_run or to_launch:
        validation_of(run)  # refuses what training would
    if dry_run:
        echo(resolved_configuration(run))
        for line in run.describe():
            echo(line)
        if (needed := estimate(run)) is not None:
            echo(needed.line())
        return
    if to_launch:  # all that a user can get wrong has been refused by now, once
        sys.exit(launch(own_command(), run.placement.machines))
    end_with_launcher()
    do(run, Console(stderr=True))
