"""`wantrain calibrate`: guidance by noise level, measured on the teacher's own clips."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shared.cli import support
from shared.cli.checks import check_writable
from shared.device import chosen_device, take_device
from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES
from shared.io.durable import write_bytes
from shared.io.names import quoted
from shared.models.spec import ModelSpec
from train.calibration.config import CalibrateConfig
from train.calibration.fit import Fit, Sums, fit
from train.calibration.measure import inner_products
from train.calibration.plot import plot
from train.data.batches import MicroBatches, load_prompt_bank
from train.data.dataset import Dataset
from train.functional.rng import counted_rng
from train.functional.schedule import MIN_SCORE_SIGMA, expert_interval, shift_sigma, unshift_sigma
from train.memory.forward_only import check_here, loaded
from train.memory.quantize import check_installed
from train.methods.guidance_file import Calibration, read_calibrations, write_calibration
from train.model.base import Base, base_digest, component_of
from train.options import Expert
from train.run import open_data

SYNTHESIS = "synthesis"
"""Of a cache's fingerprint: what made its clips."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What will be measured; no weight is read."""

    config: CalibrateConfig
    spec: ModelSpec
    data: Dataset
    expert: Expert
    base: Base
    shift: float
    sigmas: tuple[float, ...]
    """Rising."""
    rows: tuple[int, ...]
    """Samples of the data, ascending."""
    synthesis: dict[str, Any]
    """Of the cache."""

    def describe(self) -> list[str]:
        """For people, before the work."""
        clips, levels = len(self.rows), len(self.sigmas)
        passes = 2 * clips * -(-levels // self.config.batch_size)
        fewer = f" (all there are, of {self.config.clips})" if clips < self.config.clips else ""
        return [
            f"model    {self.spec.folder} ({self.spec.mode}), expert {self.expert} "
            f"({component_of(self.expert)})",
            f"clips    {clips}{fewer} of {self.data.folders}, made with CFG "
            f"{self.synthesis.get('guidance')} in {self.synthesis.get('steps')} steps",
            f"levels   {levels}, sigma {self.sigmas[0]:.3f} to {self.sigmas[-1]:.3f} (shift "
            f"{self.shift:g})",
            f"cost     {clips} clips x {levels} levels x 2 = {2 * clips * levels} predictions in "
            f"{passes} transformer passes",
        ]


def prepare_measurement(config: CalibrateConfig) -> Measurement:
    """Choose clips and levels. UserError for everything that a user can get wrong."""
    spec, data = open_data(config, {})
    synthesis = _synthesis(config, data)
    expert: Expert = config.boundary_type or ("low" if spec.two_experts else "full")
    shift = spec.flow_shift if config.flow_shift is None else config.flow_shift
    low, high = expert_interval(expert, shift, spec.boundary)
    low = max(low, unshift_sigma(MIN_SCORE_SIGMA, shift))  # scores are not compared below
    component = component_of(expert)
    base = Base.parse(config.transformer_path, config.base_lora)
    base.fetched(config.model, spec, component)
    check_installed(config.base_precision)
    if config.output.exists():
        read_calibrations(config.output, "--output")  # refuses what is no such file
    check_writable("--output", config.output.parent)
    clips = np.flatnonzero(data.types != MEDIA_TYPES.index("text"))
    if len(clips) < 2:
        raise UserError(
            f"--shards: {data.folders} has {len(clips)} clips, expected at least 2, better 24. "
            "Make more: wantrain synthesize"
        )
    chosen = counted_rng(config.seed, "calibrate clips").permutation(clips)[: config.clips]
    return Measurement(
        config=config,
        spec=spec,
        data=data,
        expert=expert,
        base=base,
        shift=shift,
        sigmas=tuple(_levels(low, high, shift, config.levels)),
        rows=tuple(sorted(chosen.tolist())),
        synthesis=synthesis,
    )


def _levels(low: float, high: float, shift: float, number: int) -> list[float]:
    """Rising σ from u `low` to `high`, evenly over the mean of both scales.

    Scores are compared evenly in u; but at shift 12 the first fifteenth of u is half of all σ, and
    w* bends there.
    """
    u = np.linspace(low, high, 10_001)
    sigma = shift_sigma(u, shift)  # type: ignore[type-var]
    come = (u - low) / (high - low) + (sigma - sigma[0]) / (sigma[-1] - sigma[0])
    return [float(one) for one in np.interp(np.linspace(0, 2, number), come, sigma)]


def _synthesis(config: CalibrateConfig, data: Dataset) -> dict[str, Any]:
    """What made the clips. UserError where not the teacher did, or differently in two caches."""
    found = [part.index.fingerprint.get(SYNTHESIS) for part in data.parts]
    for part, synthesis in zip(data.parts, found, strict=True):
        if not isinstance(synthesis, dict):
            raise UserError(
                f"--shards: {part.index.store} holds clips of media, but guidance is measured on "
                "the teacher's own: real clips would say how the teacher fits them. Make some "
                f"from its captions: wantrain synthesize --shards {quoted(part.index.store)} "
                f"--model {quoted(config.model)} --output <new folder>"
            )
        if synthesis != found[0]:
            raise UserError(
                f"--shards: {part.index.store} was synthesised otherwise than "
                f"{data.parts[0].index.store}. Measure on one of them."
            )
    assert isinstance(found[0], dict)
    return found[0]


def calibrate_guidance(measurement: Measurement, console: Console) -> Calibration:
    """Measure; write the file and its plot, print the table. Returns the expert's entry.

    The same options give the same file, on the same device.
    """
    say = partial(support.say, console)
    for line in measurement.describe():
        say(line)
    config, spec, data = measurement.config, measurement.spec, measurement.data
    expert, sigmas, base = measurement.expert, measurement.sigmas, measurement.base
    device = torch.device(chosen_device(config.device))
    take_device(str(device))
    check_here(config, str(device))
    bank = load_prompt_bank(data.first, spec.family)
    batches = MicroBatches.of_whole_samples(data, spec, bank)
    negative = bank.negative.to(device)
    products = []
    measure = partial(inner_products, batch_size=config.batch_size, seed=config.seed)
    attention = config.attention_backend
    with loaded(spec, expert, base, config.memory, attention, device, say) as roles:
        for number, row in enumerate(track(measurement.rows, "calibrate", console=console)):
            stored, _ = batches.whole_sample(row, number)
            clip = stored.to(device)
            if config.train_mode == "normal" and clip.noised is not None:
                clip = replace(clip, noised=torch.ones_like(clip.noised))
            products.append(measure(roles, clip, negative, sigmas, number=number))
    rr, rd, dd = np.stack(products).transpose(2, 0, 1)
    sums = Sums(rr=rr, rd=rd, dd=dd)
    fitted = fit(sums, np.array(sigmas))
    found = Calibration(
        sigmas=sigmas,
        scales=tuple(fitted.scales.tolist()),
        spread=tuple(fitted.spread.tolist()),
        measured=tuple(fitted.measured.tolist()),
        model=config.model,
        base=base_digest(spec.folder, component_of(expert), base),
        clips=len(measurement.rows),
        measured_on={
            "shards": data.identity(),
            "synthesis": measurement.synthesis,
            "flow_shift": measurement.shift,
            "seed": config.seed,
        },
    )
    write_calibration(config.output, expert, found)
    drawing = config.output.with_suffix(".svg")
    write_bytes(drawing, plot(read_calibrations(config.output, "--output")).encode())
    Console().print(_table(measurement, sums, fitted))
    say(f"guidance {config.output} (plot: {drawing})")
    return found


def _table(measurement: Measurement, sums: Sums, fitted: Fit) -> Table:
    """For a terminal: errors are relative to those of the conditional prediction."""
    used: Any = measurement.synthesis.get("guidance")
    title = f"Guidance of the {measurement.expert} expert; squared errors of x0 relative to no CFG"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2))
    columns = ["sigma", "w*", "+-", "error at w*"]
    errors = [sums.error(fitted.scales)]
    if isinstance(used, int | float):
        columns.append(f"error at {used:g}")
        errors.append(sums.error(float(used)))
    for name in (*columns, ""):
        shown.add_column(name, justify="right", header_style="dim")
    rows = zip(
        measurement.sigmas, fitted.scales, fitted.spread, fitted.measured, *errors, strict=True
    )
    for sigma, scale, spread, measured, *of in rows:
        noisy = "" if scale == measured else f"from its neighbours; measured {measured:.2f}"
        error = f"{spread:.2f}" if spread < 100 else "> 100"
        shown.add_row(f"{sigma:.3f}", f"{scale:.2f}", error, *(f"{one:.4f}" for one in of), noisy)
    return shown
