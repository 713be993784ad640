"""Commands that take every flag of VideoX-Fun's script, and say what became of those not theirs."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from itertools import takewhile
from typing import Annotated, Any, get_args

import typer

from shared.cli.support import Command, echo
from shared.cli.videox_fun_flags import SEED_FLAGS, SeedFlag
from shared.errors import UserError

Given = Mapping[str, tuple[str, ...]]
"""Flag of the other stage → its values as they were written."""
_LIST = {flag.option for flag in SEED_FLAGS if flag.values == "+"}
_TOLD = "docs/from-videox-fun.md has all flags"


class SeedCommand(Command):
    """A command to which lists may be given as argparse takes them: `--flag a b c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by click before anything else."""
        lists = {
            name: option.multiple for option in self.params for name in option.opts if name in _LIST
        }
        joined: list[str] = []
        rest = list(args)
        while rest:
            joined.append(rest.pop(0))
            flag = joined[-1].replace("_", "-")
            if flag in lists:
                values = list(takewhile(lambda word: not word.startswith("--"), rest))
                del rest[: len(values)]
                again = [word for value in values for word in (flag, value)][1:]
                joined += again if lists[flag] else [",".join(values)]
        try:
            return list(super().parse_args(ctx, joined))
        except Exception as error:
            # click's NoSuchOption, of which typer may have a copy of its own
            if hasattr(error, "possibilities") and hasattr(error, "option_name"):
                own = [
                    o
                    for param in self.params
                    if not getattr(param, "hidden", False)
                    for o in param.opts
                ]
                error.possibilities = get_close_matches(error.option_name, own)
            raise


def with_seed_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with a hidden option for each flag that is not its own.

    Before it runs, a line says what became of each that was given; one that asks for what there is
    not is refused. Where `command` has a parameter `given_elsewhere`, it gets the values of flags
    that another stage has.
    """
    declared = inspect.signature(command).parameters
    own = {name for parameter in declared.values() for name in _names(parameter)}
    strange = {flag.name: flag for flag in SEED_FLAGS if flag.name not in own}
    wants = "given_elsewhere" in declared

    @functools.wraps(command)
    def run(**options: Any) -> None:
        given = {
            name: _values(value)
            for name in strange
            if (value := options.pop(name)) not in (None, False, [])
        }
        lines = told(given)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine speaks
            for line in lines:
                echo(line, err=True)
        if wants:
            options["given_elsewhere"] = {n: v for n, v in given.items() if strange[n].owners}
        command(**options)

    parameters = [
        *(parameter for name, parameter in declared.items() if name != "given_elsewhere"),
        *map(_hidden, strange.values()),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return run


def told(given: Given) -> list[str]:
    """Lines that say what became of flags that a command does not have. UserError for some."""
    flags = [flag for flag in SEED_FLAGS if flag.name in given]
    for flag in flags:
        if flag.refused and given[flag.name] != (flag.same_as,):
            raise UserError(f"{flag.option}: there is none here: {flag.fate}. {_TOLD}.")
    lines = []
    for owner in sorted({flag.owners[0] for flag in flags if flag.owners}):
        names = ", ".join(flag.option for flag in flags if flag.owners and flag.owners[0] == owner)
        lines.append(f"flags    for {owner}, passed over here: {names}")
    needless = [f"{flag.option} ({flag.fate})" for flag in flags if flag.fate and not flag.refused]
    if needless:
        lines.append(f"flags    not needed: {'; '.join(needless)}")
    return lines


def _hidden(flag: SeedFlag) -> inspect.Parameter:
    kinds: dict[Any, tuple[Any, Any]] = {
        0: (bool, False),
        1: (str | None, None),
        2: (tuple[str, str] | None, None),
        "+": (list[str] | None, None),
    }
    annotation, default = kinds[flag.values]
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, typer.Option(flag.option, hidden=True)],
    )


def _values(value: Any) -> tuple[str, ...]:
    if value is True:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _names(parameter: inspect.Parameter) -> Iterator[str]:
    """What an option may be called, with underscores."""
    yield parameter.name
    for info in get_args(parameter.annotation)[1:]:
        for spelling in getattr(info, "param_decls", None) or ():
            yield from (
                part.removeprefix("--").replace("-", "_") for part in str(spelling).split("/")
            )
