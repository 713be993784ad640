"""What every command that trains does with its prepared run."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console

from shared.cli.support import echo, say
from train.both import configs_of_experts, train_both, with_default
from train.config import TrainConfig
from train.distributed.launcher import end_with_launcher, launch, own_command
from train.joint_validation import describe, joint_validation
from train.loop import train, validation_of
from train.run import Run, estimate, resolved_configuration

_Config = TypeVar("_Config", bound=TrainConfig)


def train_it(run: Run, console: Console) -> None:
    """Train. Exits with 128 + the signal that stopped it."""
    _exit_if_stopped(train(run, console), run, console)


def carry_out_all(config: _Config, prepare: Callable[[_Config], Run]) -> None:
    """Prepare and `carry_out` what is asked for: a run, or one of each expert."""
    config = with_default(config)
    if config.boundary_type != "both":
        carry_out(prepare(config))
        return
    runs = [prepare(one) for one in configs_of_experts(config)]
    if _are_to_train(runs):
        console = Console(stderr=True)
        _exit_if_stopped(train_both(config, runs, console), runs[0], console)
    elif (together := joint_validation(config, runs)) is not None:
        echo(describe(together, runs))


def carry_out(run: Run, do: Callable[[Run, Console], None] = train_it) -> None:
    """Train (or `do` something else) in all processes of the run, or print what would be done."""
    if _are_to_train([run]):
        do(run, Console(stderr=True))


def _are_to_train(runs: Sequence[Run]) -> bool:
    """Whether this process is to train. It prints what would be done if that is asked for, and
    exits where it starts the processes that train."""
    config, placement = runs[0].config, runs[0].placement
    if config.dry_run or placement.to_launch:
        for run in runs:
            validation_of(run)  # refuses what training would
    if config.dry_run:
        for run in runs:
            echo(resolved_configuration(run))
            for line in run.describe():
                echo(line)
            if (needed := estimate(run)) is not None:
                echo(needed.line())
        return False
    if placement.to_launch:  # all that a user can get wrong has been refused by now, once
        sys.exit(launch(own_command(), placement.machines))
    end_with_launcher()
    return True


def _exit_if_stopped(signum: int | None, run: Run, console: Console) -> None:
    if signum is None:
        return
    if run.ranks.first:
        resume = "resume with the same command and --resume-from-checkpoint latest"
        say(console, f"stopped  by a signal; {resume}")
    sys.exit(128 + signum)
