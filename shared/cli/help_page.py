"""`--help` as a page to read: what the command does, examples to paste, options in groups.

Rich's boxes, typer's default, cut long option names off on a terminal of 80 columns.
"""

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

OTHER = "Other"
_NAME_COLUMN = 30  # a longer name gets a line of its own, the help below it


class HelpPage(TyperCommand):
    """A command whose options stand under the headings of their `rich_help_panel`.

    The epilog holds the examples: it comes before the options and is printed as it is.
    """

    panels: Sequence[str] = ()
    """Headings that come first, in this order."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page; called by click for --help."""
        formatter.write_usage(ctx.command_path, "[OPTIONS]")
        self.format_help_text(ctx, formatter)
        formatter.write(f"\n{_heading('Examples')}\n")
        for line in (self.epilog or "").strip().splitlines():
            shown = typer.style(line, dim=True) if line.startswith("#") else line
            formatter.write(f"  {shown}".rstrip() + "\n")

        groups: dict[str, list[tuple[str, str]]] = {panel: [] for panel in self.panels}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or OTHER
                groups.setdefault(str(panel), []).append(record)
        groups[OTHER] = groups.pop(OTHER)  # --help comes last
        for name, records in groups.items():
            formatter.write(f"\n{_heading(name)}\n")
            formatter.indent()
            for names, text in records:  # one by one and padded: a column for the whole page
                formatter.write_dl([(f"{names:<{_NAME_COLUMN}}", text)], col_max=_NAME_COLUMN)
            formatter.dedent()


def _heading(text: str) -> str:
    return typer.style(f"{text}:", bold=True)
