"""What both command lines do alike: underscores for dashes, one message for a user's error."""

import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperGroup

from shared.cli.help_page import HelpPage
from shared.cli.left_out import unasked_left_out
from shared.cli.library_log import quiet_libraries
from shared.cli.run_file import CONFIG, WRITE_CONFIG, file_options, words_of_file, write_run_file
from shared.errors import UserError
from shared.io.names import on_lines, without_secrets
from shared.io.object_store import refuse_secrets

# The seed document writes --train_data_dir, people of this century --train-data-dir: both are read.
CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,  # a help page is as wide as the terminal, up to this
}


class Command(HelpPage):
    """A command with a help page; what it can't do without is shown by an example in its errors.

    Its options can come from a file, and be written to one.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params = [*self.params, *file_options()]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by click: the words of a run file come before those that were typed."""
        from_environment = (os.environ.get(str(option.envvar), "") for option in self.params)
        for word in (*args, *from_environment):
            refuse_secrets(word)
        typed, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[WRITE_CONFIG] = typed.get(WRITE_CONFIG)
        if file := typed.get(CONFIG):
            given = {option.name for option in order}
            words = words_of_file(Path(file), str(self.name), self.params, given)
            for word in words:
                refuse_secrets(word)
            args = [*words, *args]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run it; or write its options and do nothing else."""
        if file := ctx.meta[WRITE_CONFIG]:
            declared: Any = self.callback
            hints = get_type_hints(inspect.unwrap(declared), include_extras=True)  # typer wraps it
            values = {option.name: ctx.params.get(option.name) for option in self.params}
            write_run_file(Path(file), str(self.name), hints, values)
            raise typer.Exit
        return super().invoke(ctx)

    def get_usage(self, ctx: Any) -> str:
        """What click prints above an error."""
        usage = super().get_usage(ctx)
        if not any(parameter.required for parameter in self.get_params(ctx)):
            return usage
        return f"{usage}\n\nExample:\n{_indented(_blocks(self.epilog)[0])}\n"


class _Group(TyperGroup):
    """A program whose epilog holds examples, printed as they are."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, with libraries quiet and those that nobody asks for left out."""
        quiet_libraries()
        with unasked_left_out():
            return super().invoke(ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples; called by click for --help."""
        formatter.write("\nExamples:\n" + "\n\n".join(map(_indented, _blocks(self.epilog))) + "\n")


def _blocks(examples: str | None) -> list[str]:
    """Examples, each with the comment above it; a blank line ends one."""
    return (examples or "").strip().split("\n\n")


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")


def run(app: Callable[[], Any]) -> None:
    """Run a typer app; print a UserError as one message on stderr and exit with code 1."""
    choose_allocator()
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {on_lines(without_secrets(str(error)))}", fg="red", err=True)
        sys.exit(1)


def choose_allocator() -> None:
    """torch's allocator of CUDA with segments that grow, unless the user chose; before its import.

    Buckets of several sizes leave fragments without: reserved over allocated 1.08, with 1.03
    (simulated).
    """
    new, old = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    if new not in os.environ and old not in os.environ:
        try:
            major, minor, *_ = version("torch").split(".")
        except PackageNotFoundError:  # which `doctor` is to say
            return
        name = new if (int(major), int(minor)) >= (2, 10) else old
        os.environ[name] = "expandable_segments:True"


def new_app(help_text: str, examples: str) -> typer.Typer:
    """A typer app with the project's conventions; `examples` end its help page."""
    return typer.Typer(
        cls=_Group,
        help=help_text,
        epilog=examples,
        context_settings=CONTEXT,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help pages are our own, errors plain lines that logs can keep
        add_completion=False,
    )


def text_and_examples(do: Callable[..., Any]) -> tuple[str, str]:
    """A docstring in two: what stands above its "Examples:", and those."""
    text, _, examples = inspect.cleandoc(do.__doc__ or "").partition("\n\nExamples:\n")
    return text, textwrap.dedent(examples)


def add_command(app: typer.Typer, do: Callable[..., None]) -> None:
    """Make `do` a command of `app`, whose options are its parameters."""
    text, examples = text_and_examples(do)
    app.command(cls=Command, help=text, epilog=examples)(do)


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: rich would read [brackets] and :cat: in file names, and wrap paths."""
    plain = on_lines(text)
    console.print(plain, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def echo(text: str, *, err: bool = False) -> None:
    """A line of output for people."""
    typer.echo(on_lines(text), err=err)


def echo_data(text: str) -> None:
    """Output for programs: every character counts."""
    typer.echo(text)
