"""Commands whose options are the fields of a configuration: each is declared once, there.

A field is `name: Annotated[type, typer.Option(help=…, rich_help_panel=GROUP), check …] = default`.
Typer reads the signature that the dataclass has anyway; its docstring is the help page's text.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer

from shared.cli.support import Command, text_and_examples

_Config = TypeVar("_Config")


def add_config_command(
    app: typer.Typer,
    config: type[_Config],
    do: Callable[[_Config, typer.Context], None],
    *,
    cls: type[Command] = Command,
) -> None:
    """Make `do` a command of `app`, which builds a `config` from its options and does it.

    `config.PANELS` is the order of the groups on the help page, its docstring the text there.
    """

    class ConfigCommand(cls):  # type: ignore[misc, valid-type]
        panels = config.PANELS  # type: ignore[attr-defined]

        def configuration(self, ctx: Any) -> Any:
            return super().invoke(ctx)

        def invoke(self, ctx: Any) -> Any:
            do(self.configuration(ctx), ctx)

    name, (_, examples) = do.__name__.replace("_", "-"), text_and_examples(do)
    app.command(name, cls=ConfigCommand, epilog=examples)(config)


def configuration(app: typer.Typer, words: Sequence[str]) -> Any:
    """What a command of `app` would do its work with, from its name and its options; no work is
    done. Raises as the command does."""
    name, *options = words
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    with command.make_context(name, options, parent=group.make_context(name, [name])) as context:
        return command.configuration(context)
