"""Draw tables that `learning.py` measured, as functions of generator updates.

    python benchmarks/plot_learning.py benchmarks/work/recipes.json docs/recipes.svg

Of several tables, each with its own number of seeds, the first gives the teachers' lines.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "wandistill"  # equal numbers, equal file
import matplotlib.pyplot as plt  # noqa: E402
from toy_students import mean_and_error  # noqa: E402

TEACHERS = {"a": "#4c72b0", "b": "#55a868", "c": "#c44e52"}
STUDENTS = ("black", "#dd8452", "#8172b3", "#937860", "#da8bc3")
METRICS = {
    "accuracy": "caption accuracy",
    "distance": "distance to the teacher at 40 steps",
    "contrast": "contrast (teacher = 1)",
    "motion": "motion (teacher = 1)",
}
LABEL = re.compile(r"d  student, (?P<updates>\d+) updates(?: \(Euler\))?(?:: (?P<name>.*))?")


def draw(tables: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a metric: each student as points with standard errors, the teachers as bands."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for panel, (metric, title) in zip(panels.flat, METRICS.items(), strict=True):
        lines = {
            f"{name}, {of} {'seed' if of == 1 else 'seeds'}": points
            for table in tables
            for of in [table["seeds"]]
            for name, points in students(table["rows"], metric).items()
        }
        for label, colour in teachers(tables[0]["rows"]).items():
            mean, error = mean_and_error(tables[0]["rows"][label][metric])
            panel.axhspan(mean - error, mean + error, color=colour, alpha=0.25, lw=0)
            panel.axhline(mean, color=colour, lw=1, label=label[3:])
        for (label, points), colour in zip(lines.items(), STUDENTS, strict=False):
            updates = sorted(points)
            means, errors = zip(*(points[n] for n in updates), strict=True)
            panel.errorbar(
                updates, means, errors, color=colour, marker="o", ms=4, capsize=3, label=label
            )
        panel.set_xlabel("generator updates")
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        measured = sorted({n for points in lines.values() for n in points})
        if measured[-1] > 200:
            panel.set_xscale("log", base=2)
            panel.set_xticks(measured, [str(n) for n in measured], minor=False)
            panel.set_xticks([], minor=True)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def students(
    rows: dict[str, dict[str, list[float]]], metric: str
) -> dict[str, dict[int, tuple[float, float]]]:
    """Student → updates → mean and standard error."""
    points: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for label, row in rows.items():
        if found := LABEL.fullmatch(label):
            name = found["name"] or "student, 4 steps, no CFG"
            points[name][int(found["updates"])] = mean_and_error(row[metric])
    return points


def teachers(rows: dict[str, Any]) -> dict[str, str]:
    """Row → colour; of 4 steps in two ways the re-noised ones, where both were measured."""
    few = [label for label in rows if label[0] in "bc"]
    renoised = [label for label in few if "(Euler)" not in label] or few
    return {label: TEACHERS[label[0]] for label in rows if label[0] == "a" or label in renoised}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, nargs="+", help="JSON that learning.py has written")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw([json.loads(table.read_text()) for table in args.table], args.picture)


if __name__ == "__main__":
    main()
