"""`wantrain bench` on the command line."""

import typer

from shared.cli.support import echo
from shared.cli.videox_fun_command import given_elsewhere
from train.config import BenchConfig


def bench(config: BenchConfig, context: typer.Context) -> None:
    r"""Measure a run that is prepared as `distill` prepares it.

    Examples:
        # the overhead of a run with these options
        wantrain bench --boundary-type high --rank 128

        # the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
        wantrain bench --model toy --shards toy-shards --boundary-type full \
            --train-batch-size 2 --rank 8
    """
    from dataclasses import replace

    from rich.console import Console

    from train.bench.bench import measure
    from train.cli.execute import carry_out
    from train.prepare import prepare_distillation
    from train.run import Run

    def measured(run: Run, console: Console) -> None:
        report = measure(run, console, cycles=config.cycles)
        if report is None:  # not the first process
            return
        echo("\n".join(report.lines()))
        if config.json_file is not None:
            config.json_file.write_text(report.to_text() + "\n")

    config = replace(config, critic_warmup=0)  # of the cycles, the first one warms up
    carry_out(prepare_distillation(config, given_elsewhere(context)), measured)
