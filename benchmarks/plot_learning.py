"""Draw what `learning.py` measured: accuracy and distance as functions of generator updates.

python benchmarks/plot_learning.py benchmarks/work/full.json docs/learning.svg
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "wandistill"  # equal numbers, equal file
import matplotlib.pyplot as plt  # noqa: E402
from toy_students import mean_and_error  # noqa: E402

COLOURS = {"a": "#4c72b0", "b": "#55a868", "c": "#c44e52"}
METRICS = {"accuracy": "caption accuracy", "distance": "distance to the teacher at 40 steps"}


def draw(result: dict, path: Path) -> None:
    """One panel a metric: the student as points with standard errors, the teachers as bands."""
    rows: dict[str, dict[str, list[float]]] = result["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        points = {}
        for label, row in rows.items():
            mean, error = mean_and_error(row[metric])
            found = re.match(r"d .* (\d+) updates", label)
            if found:
                points[int(found[1])] = (mean, error)
                continue
            if label.startswith("c"):
                points[0] = (mean, error)
            colour = COLOURS[label[0]]
            panel.axhspan(mean - error, mean + error, color=colour, alpha=0.25, lw=0)
            panel.axhline(mean, color=colour, lw=1, label=label[3:])
        updates = sorted(points)
        means, errors = zip(*(points[n] for n in updates), strict=True)
        panel.errorbar(
            updates, means, errors, color="black", marker="o", ms=4, capsize=3,
            label="student, 4 steps, no CFG",
        )  # fmt: skip
        panel.set_xlabel("generator updates")
        panel.set_title(f"{title}, {result['seeds']} seeds", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


if __name__ == "__main__":
    main()
