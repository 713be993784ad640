"""`wantrain synthesize` on the command line."""

import typer

from train.synthesis.config import SynthesizeConfig


def synthesize(config: SynthesizeConfig, _: typer.Context) -> None:
    r"""Make the clips, and say what the cache holds and what comes next.

    Examples:
        # 100 clips of Wan2.2-I2V-A14B from the conditions in shards/, with the
        # states of a 4-step student; first what it would cost
        wantrain synthesize --count 100 --states "1000 750 500 250" --dry-run
        wantrain synthesize --count 100 --states "1000 750 500 250"

        # on eight GPUs, four clips in a pass
        wantrain synthesize --num-processes 8 --batch-size 4

        # states of a trained high-noise student, where its low-noise one takes over
        wantrain synthesize --step-list "1000 750 500 250" --guidance 1 \
            --high-lora output_dir_high/lora-high-diffusers.safetensors \
            --output shards-handover

        # the bundled toy model on its shards of `wanprep encode`, seconds on a CPU
        wantrain synthesize --model toy --shards toy-shards --output toy-own \
            --guidance 2 --steps 20
    """
    import sys
    from contextlib import ExitStack

    from rich.console import Console

    from shared.cache.report import contents
    from shared.cli.console import count
    from shared.cli.support import echo, say
    from shared.interrupt import SIGNAL_EXIT
    from shared.io.mirror import open_store
    from shared.io.names import quoted
    from train.distributed.launcher import Machines, end_with_launcher, launch, own_command
    from train.synthesis import run
    from train.synthesis.engine import LocalEngine, MakeEngine
    from train.synthesis.job import foresee, read_job

    console = Console(stderr=True)
    rank = config.rank
    job = read_job(config)
    if config.dry_run:
        for line in job.describe():
            echo(line)
        with open_store(config.output).pulled() as output:
            for line in foresee(job, output):
                echo(line)
        return
    if config.num_processes > 1 and rank.world == 1:
        machines = Machines(num_processes=config.num_processes)
        sys.exit(launch(own_command(), machines, to_go_on="Run the same command again."))
    end_with_launcher()
    for line in job.describe():
        say(console, line)
    with ExitStack() as held:
        engine: MakeEngine = LocalEngine
        if config.engine == "ray":
            from train.synthesis.ray_engines import on_cluster

            job, engine, line = held.enter_context(on_cluster(job))
            say(console, line)
        output = held.enter_context(open_store(config.output, writer=rank.number).pulled())
        outcome = run.synthesize(job, output, console, engine)
    if outcome.index is not None:
        echo(contents(outcome.index))
    if outcome.signum is not None:
        left = count(outcome.left, "clip")
        echo(f"interrupted, {left} to go. To continue, run the same command again.", err=True)
        raise typer.Exit(SIGNAL_EXIT + outcome.signum)
    if not outcome.written:
        echo("nothing to do: every clip is in the shards")
    echo(f"next: wantrain distill --shards {quoted(output)}")
