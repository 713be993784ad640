"""`wantrain bench` on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from shared.cli.support import Command, echo
from train.cli.options import INPUT, OUTPUT

BENCH_EXAMPLES = """
# how lean a run with these options is; how fast the shards are read
wantrain bench --boundary-type high --rank 128
wantrain bench --cycles 0

# the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
wantrain bench --model toy --shards toy-shards --boundary-type full \\
    --train-batch-size 2 --rank 8
"""


# fmt: off
def bench(
    context: typer.Context,
    cycles: Annotated[int, typer.Option(metavar="N", min=0, help="Generator updates that are measured, each with its critic updates; one more warms up. 0: the loader alone.", rich_help_panel=INPUT)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here, too.", show_default="nowhere", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Measure how lean a run is on this machine.

    Says what the loop costs beside the passes of the transformer, how many FLOPs an update has and how fast they are done, what lies in memory, and how fast the shards are read. Takes every option of `wantrain distill`; runs its loop for a few updates in a temporary folder, which is thrown away. Of several processes (--strategy), it tells of the first one.

    Next: wantrain distill, with the same options
    """
    from train.bench.bench import Report, measure
    from train.cli.execute import carried_out_by

    assert context.parent is not None and isinstance(context.parent.command, TyperGroup)
    reports: list[Report | None] = []
    distill = context.parent.command.commands["distill"]
    with (
        carried_out_by(lambda run, to: reports.append(measure(run, to, cycles=cycles))),
        distill.make_context("bench", [*context.args], parent=context.parent) as its,
    ):
        distill.invoke(its)
    for report in filter(None, reports):  # none after --dry-run
        for line in report.lines():
            echo(line)
        if json_file is not None:
            json_file.write_text(report.to_text() + "\n")


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}  # those of distill
    app.command(cls=Command, epilog=BENCH_EXAMPLES, context_settings=settings)(bench)
