"""`wantrain calibrate` on the command line."""

import typer

from train.calibration.config import CalibrateConfig


def calibrate(config: CalibrateConfig, _: typer.Context) -> None:
    r"""Measure, or print what would be measured.

    Examples:
        # both experts of Wan2.2-I2V-A14B, on clips of `wantrain synthesize`
        wantrain calibrate --boundary-type high --shards teacher-clips
        wantrain calibrate --boundary-type low --shards teacher-clips
        wantrain distill --guidance guidance.json

        # the bundled toy model: the cost, then the measurement, a minute on a CPU
        wantrain calibrate --model toy --shards toy-own --dry-run
        wantrain calibrate --model toy --shards toy-own --batch-size 5
    """
    from rich.console import Console

    from shared.cli.support import echo
    from train.calibration.calibrate import calibrate_guidance, prepare_measurement

    measurement = prepare_measurement(config)
    if config.dry_run:
        echo("\n".join(measurement.describe()))
        return
    calibrate_guidance(measurement, Console(stderr=True))
