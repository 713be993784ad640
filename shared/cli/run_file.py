"""Options from a TOML file: a table a command, an option's name as key; and written as one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer

from shared.errors import UserError
from shared.io.durable import write_bytes
from shared.io.names import without_secrets
from shared.io.toml_file import read_toml

CONFIG, WRITE_CONFIG = "config", "write_config"
PANEL = "Run file"
RUN_FILE = "run.toml"
_WIDTH = 98


def file_options() -> list[Any]:
    """The two options that every command has about such files, as click has options."""
    app = typer.Typer(add_completion=False)

    # fmt: off
    @app.command()
    def _(
        config: Annotated[Path | None, typer.Option(metavar="FILE", help="Take options from a TOML file: a table a command, option names as keys, paths as on the command line. Options given here win.", show_default="none", rich_help_panel=PANEL)] = None,
        write_config: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all options to a TOML file, with what they mean, and stop.", show_default="off", rich_help_panel=PANEL)] = None,
    ) -> None: ...
    # fmt: on

    found: Any = typer.main.get_command(app)
    for option in found.params:
        option.expose_value = False
    return list(found.params)


def words_of_file(path: Path, command: str, options: Sequence[Any], given: set[str]) -> list[str]:
    """What a run file says, as words of the command line; options that are `given` are left out.

    UserError where the file can't be read or has no table of the command, and for unknown keys.
    """
    words: list[str] = []
    keys = {
        name.lstrip("-").replace("-", "_"): option for option in options for name in option.opts
    }
    for key, value in _table(path, command).items():
        option = keys.get(key.replace("-", "_"))
        if option is None or option.name in (CONFIG, WRITE_CONFIG):
            near = get_close_matches(key.replace("-", "_"), keys, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"--config: {path}: [{command}] has an unknown key {key!r}{meant} "
                f"`--write-config FILE` lists all."
            )
        if option.name not in given:
            words += _words(path, key, option, value)
    return words


def _table(path: Path, command: str) -> dict[str, Any]:
    try:
        found = read_toml(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--config: can't read {path} as TOML ({why}).") from error
    table = found.get(command)
    if not isinstance(table, dict):
        listed = ", ".join(f"[{name}]" for name in found) or "nothing"
        raise UserError(f"--config: {path} has {listed}, expected a table [{command}].")
    return table


def _words(path: Path, key: str, option: Any, value: Any) -> list[str]:
    name = option.opts[0]
    if option.is_flag:
        if not isinstance(value, bool):
            raise UserError(f"--config: {path}: {key} is {value!r}, expected true or false.")
        if not value:
            return [option.secondary_opts[0]] if option.secondary_opts else []
        return [name]
    values = value if isinstance(value, list) else [value]
    texts = [str(one) for one in values]
    if option.multiple:
        return [f"{name}={text}" for text in texts]
    if option.nargs > 1:
        return [name, *texts]
    return [f"{name}={','.join(texts)}"]


def write_run_file(
    path: Path, command: str, hints: Mapping[str, Any], values: Mapping[str, Any]
) -> None:
    """Write `run_file`. UserError where nothing can be written there."""
    try:
        write_bytes(path, run_file(command, hints, values).encode())
    except OSError as error:
        raise UserError(f"run file: can't write {path} ({error.strerror}).") from error


def run_file(command: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """A run file with one table: each option with its help, its default and its value.

    `hints`: name → annotation with typer's option in it; `values`: name → value, None where it is
    not set. No secret of a URL is in it.
    """
    return "\n".join([f"[{command}]", *_lines(hints, values)]) + "\n"


def _lines(hints: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        info = next(
            (one for one in getattr(hints.get(name), "__metadata__", ()) if hasattr(one, "help")),
            None,
        )
        if info is None or info.hidden:
            continue
        default = info.show_default if isinstance(info.show_default, str) else None
        yield ""
        yield from (f"# {line}" for line in wrap(info.help, _WIDTH))
        if default:
            yield f"# default: {default}"
        yield f"# {name} =" if value is None or value == [] else f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # A basic string of TOML takes JSON's escapes.
    return json.dumps(without_secrets(str(value)), ensure_ascii=False)
