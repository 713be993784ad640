"""Draw what `learning.py` measured, as functions of generator updates.

python benchmarks/plot_learning.py benchmarks/work/recipes.json docs/recipes.svg
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

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


def draw(result: dict, path: Path) -> None:
    """One panel a metric: each student as points with standard errors, the teachers as bands."""
    rows: dict[str, dict[str, list[float]]] = result["rows"]
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for panel, (metric, title) in zip(panels.flat, METRICS.items(), strict=True):
        points: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
        for label, row in rows.items():
            mean, error = mean_and_error(row[metric])
            if found := LABEL.fullmatch(label):
                name = found["name"] or "student, 4 steps, no CFG"
                points[name][int(found["updates"])] = (mean, error)
            elif "(Euler)" not in label or not any("(Euler)" not in other for other in rows):
                colour = TEACHERS[label[0]]
                panel.axhspan(mean - error, mean + error, color=colour, alpha=0.25, lw=0)
                panel.axhline(mean, color=colour, lw=1, label=label[3:])
        for (name, of_student), colour in zip(points.items(), STUDENTS, strict=False):
            updates = sorted(of_student)
            means, errors = zip(*(of_student[n] for n in updates), strict=True)
            panel.errorbar(
                updates, means, errors, color=colour, marker="o", ms=4, capsize=3, label=name
            )
        panel.set_xlabel("generator updates")
        panel.set_title(f"{title}, {result['seeds']} seeds", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


if __name__ == "__main__":
    main()
