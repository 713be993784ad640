"""Commands that take every flag of VideoX-Fun's script, and report those that are not theirs."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

import typer

from shared.cli.support import Command, echo
from shared.cli.videox_fun_flags import VIDEOX_FUN_FLAGS, VideoXFunFlag
from shared.errors import UserError

Given = Mapping[str, tuple[str, ...]]
"""Flag of the other stage → its values as they were written."""
ENCODE, TRAIN = "wanprep encode", "wantrain distill"
_FLAGS = {flag.option: flag for flag in VIDEOX_FUN_FLAGS}
GIVEN = "flags of VideoX-Fun's script that the command has no option for"


def given_elsewhere(context: typer.Context) -> Given:
    """The flags given to a command that are options of another one."""
    given: Given = context.meta[GIVEN]
    return {f.name: given[f.name] for f in VIDEOX_FUN_FLAGS if f.name in given and not f.reason}


class VideoXFunCommand(Command):
    """A command that takes lists as argparse does, `--flag a b c`, and flags that are not its own.

    Before it runs, it reports the flags that have no effect here; unsupported ones are refused.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by click before anything else."""
        own = {
            name: option
            for option in self.params
            for name in (*option.opts, *option.secondary_opts)
        }
        given: dict[str, tuple[str, ...]] = ctx.meta.setdefault(GIVEN, {})
        joined: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            flag = _FLAGS.get(name)
            if flag is None or (name in own and (flag.values != "+" or equals)):
                joined.append(word)
            elif name in own:
                values = _values(flag, rest)
                if own[name].multiple and values:
                    joined += [part for value in values for part in (name, value)]
                else:
                    joined += [name, ",".join(values)]
            elif equals:
                given[flag.name] = (value,)
            else:
                given[flag.name] = values = _values(flag, rest)
                if flag.values not in ("+", len(values)):
                    wanted = "an argument" if flag.values == 1 else f"{flag.values} arguments"
                    ctx.fail(f"Option {name!r} requires {wanted}.")
        try:
            return list(super().parse_args(ctx, joined))
        except Exception as error:
            # click's NoSuchOption, of which typer may have a copy of its own
            if hasattr(error, "possibilities") and hasattr(error, "option_name"):
                error.possibilities = get_close_matches(error.option_name, own)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run it, after a report of the other flags."""
        lines = flag_report(ctx.meta[GIVEN], ctx.parent.command)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine prints
            for line in lines:
                echo(line, err=True)
        return super().invoke(ctx)


def _values(flag: VideoXFunFlag, rest: list[str]) -> tuple[str, ...]:
    """Take what follows a flag off the words behind it."""
    most = len(rest) if flag.values == "+" else flag.values
    values = tuple(takewhile(lambda word: not word.startswith("--"), rest[:most]))
    del rest[: len(values)]
    return values


def flag_report(given: Given, program: Any) -> list[str]:
    """Lines about flags that a command of `program`, the group, does not have. UserError for
    unsupported ones."""
    flags = [flag for flag in VIDEOX_FUN_FLAGS if flag.name in given]
    for flag in flags:
        if flag.refused and given[flag.name] != (flag.same_as,):
            raise UserError(
                f"{flag.option}: not supported: {flag.reason}. docs/from-videox-fun.md lists all "
                "flags."
            )
    lines = []
    for owner in (ENCODE, TRAIN):
        names = [f.option for f in flags if not f.reason and _owner(f, program) == owner]
        if names:
            lines.append(f"flags    for {owner}, ignored here: {', '.join(names)}")
    unneeded = [
        f"{flag.option} ({flag.reason})" for flag in flags if flag.reason and not flag.refused
    ]
    if unneeded:
        lines.append(f"flags    not needed: {'; '.join(unneeded)}")
    return lines


def _owner(flag: VideoXFunFlag, program: Any) -> str:
    """The program's own main command, if that has the flag as an option, else the other's."""
    own, other = (TRAIN, ENCODE) if "distill" in program.commands else (ENCODE, TRAIN)
    options = program.commands[own.split()[1]].params
    return own if any(flag.option in option.opts for option in options) else other
