"""What every command that trains does with its prepared run."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, TypeVar

from rich.console import Console

from shared.cli.support import echo, say
from train.cli.options import names
from train.config import TrainConfig
from train.data.filters import condition
from train.distributed.launcher import end_with_launcher, launch, own_command
from train.distributed.placement import place
from train.loop import train, validation_of
from train.memory.options import MemoryOptions
from train.model.base import Base
from train.run import Run, estimate, resolved_configuration

_Config = TypeVar("_Config", bound=TrainConfig)
_instead: ContextVar[Callable[[Run, Console], None] | None] = ContextVar("instead", default=None)


@contextmanager
def carried_out_by(do: Callable[[Run, Console], None]) -> Iterator[None]:
    """Commands that train do this with the run that they prepared, in place of training it."""
    before = _instead.set(do)
    try:
        yield
    finally:
        _instead.reset(before)


def configured(kind: type[_Config], options: Mapping[str, Any], **read: Any) -> _Config:
    """A command's configuration, from its options and what it has `read` from them itself.

    Raises UserError where one can't be read, or they don't go together.
    """
    strategy, placement = place(
        options["strategy"],
        num_processes=options["num_processes"],
        num_machines=options["num_machines"],
        machine_rank=options["machine_rank"],
        main_process_ip=options["main_process_ip"],
        main_process_port=options["main_process_port"],
        ddp_timeout=options["ddp_timeout"],
        device=options["device"],
    )
    read |= {
        "base": Base.parse(options["transformer_path"], options["base_lora"]),
        "shards": tuple(options["shards"]),
        "where": tuple(map(condition, options["where"])),
        "encoded_as": options["given_elsewhere"] or {},
        "memory": MemoryOptions.of(options, strategy),
        "placement": placement,
    }
    for name in ("report_to", "target_name", "lora_skip_name"):
        read[name] = names(options[name])
    return kind(
        **{one.name: options[one.name] for one in fields(kind) if one.name not in read}, **read
    )


def carry_out(run: Run, *, dry_run: bool) -> None:
    """Train, or print what would be done. Exits with 128 + the signal that stopped it."""
    placement = run.config.placement
    if dry_run or placement.to_launch:
        validation_of(run)  # refuses what training would
    if dry_run:
        echo(resolved_configuration(run))
        for line in run.describe():
            echo(line)
        if (needed := estimate(run)) is not None:
            echo(needed.line())
        return
    if placement.to_launch:  # all that a user can get wrong has been refused by now, once
        sys.exit(launch(own_command(), placement.machines))
    end_with_launcher()
    console = Console(stderr=True)
    if (instead := _instead.get()) is not None:
        instead(run, console)
        return
    stopped_by = train(run, console)
    if stopped_by is not None:
        if placement.ranks.first:
            go_on = "go on with the same command and --resume-from-checkpoint latest"
            say(console, f"stopped  by a signal; {go_on}")
        sys.exit(128 + stopped_by)
