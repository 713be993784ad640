"""Numbers of a run, from the files that it logs to: curves, times, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from train.model.roles import GENERATOR
from train.page.charts import Chart, Curve
from train.run import Run
from train.tracking.gauges import BANDS, VARIETY
from train.tracking.metrics_file import UPDATE
from train.tracking.step_log import DATA_WAIT, SAMPLES, SECONDS

Metrics = Sequence[dict[str, float | None]]
_RECENT = 200
"""Updates whose speed says how long the others take."""
_NOTES = {GENERATOR: "of a normalised gradient: it need not fall"}


def charts_of(metrics: Metrics, held_out: Sequence[tuple[int, float]], updates: int) -> list[Chart]:
    """Curves over updates, of what there are numbers of."""
    names = dict.fromkeys(name for record in metrics for name in record)

    def curve(name: str, label: str, noisy: bool) -> Curve:
        points = [(int(r[UPDATE] or 0), r[name]) for r in metrics if name in r]
        return Curve.of(label, points, noisy=noisy)

    def chart(title: str, named: Mapping[str, str], *, noisy: bool = True, **more: Any) -> Chart:
        curves = [curve(name, label, noisy) for name, label in named.items() if name in names]
        return Chart(title=title, curves=curves, updates=updates, **more)

    def below(prefix: str) -> dict[str, str]:
        return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    charts = [
        chart(f"Loss: {role}", {name: role}, note=_NOTES.get(role, ""))
        for name, role in below("loss/").items()
    ]
    if held_out:
        step, lowest = min(held_out, key=lambda point: point[1])
        note = f"lowest {lowest:.4g} after {step} updates"
        one = Curve.of("held out", held_out, noisy=False)
        charts.append(Chart(title="Loss: held out", curves=[one], updates=updates, note=note))
    for gauge, band in BANDS.items():
        exits = below(f"gauge/{gauge}@")
        named = {n: f"t {exits[n]}" for n in sorted(exits, key=lambda n: -float(exits[n]))}
        whose = "the base's" if gauge == VARIETY else "the teacher's"
        note = f"1 is {whose}; the shaded band has no warning"
        named = named or {f"gauge/{gauge}": gauge}
        charts.append(chart(f"Gauge: {gauge}", named, noisy=False, band=band, note=note))
    charts += [
        chart("Critic's error over the teacher's", {"balance/critic_over_teacher": "ratio"}),
        chart("Gradient norm before clipping", below("grad_norm/")),
        chart("Learning rate", below("learning_rate/"), noisy=False),
        chart("Seconds of an update", {SECONDS: "in all", DATA_WAIT: "waiting for data"}),
    ]
    finite = [replace(one, curves=[c for c in one.curves if len(c.values)]) for one in charts]
    return [one for one in finite if one.curves]


def seconds_spent(metrics: Metrics) -> float:
    """Of all updates; validation and saving are not counted."""
    return sum(record.get(SECONDS) or 0.0 for record in metrics)


def seconds_left(run: Run, updates: int, metrics: Metrics) -> float | None:
    """Of the updates to come, if they take what recent ones took; None before the first."""
    recent: dict[str, list[float]] = {}
    for record in metrics[-_RECENT:]:
        role = run.objective.role_of(int(record[UPDATE] or 0) - 1)
        recent.setdefault(role, []).append(record.get(SECONDS) or 0.0)
    if not recent:
        return None
    means = {role: fmean(seconds) for role, seconds in recent.items()}
    other = max(means.values())
    count = run.objective.role_updates
    return sum(
        (count(role, run.updates) - count(role, updates)) * means.get(role, other)
        for role in run.objective.learning_rates
    )


def samples_shown(metrics: Metrics) -> int:
    """In all updates, repeats counted."""
    return round(sum((r.get(SECONDS) or 0.0) * (r.get(SAMPLES) or 0.0) for r in metrics))
