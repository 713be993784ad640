"""What both command lines do alike: underscores for dashes, one message for a user's error."""

import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from shared.errors import UserError

# The seed document writes --train_data_dir, people of this century --train-data-dir: both are read.
CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}


def run(app: Callable[[], Any]) -> None:
    """Run a typer app; print a UserError as one message on stderr and exit with code 1."""
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


def new_app(help_text: str) -> typer.Typer:
    """A typer app with the project's conventions."""
    return typer.Typer(
        help=help_text,
        context_settings=CONTEXT,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help pages are our own, errors plain lines that logs can keep
        add_completion=False,
    )


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: rich would read [brackets] in file names as markup, and wrap paths."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
