"""Charts of bench results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.bench.spec import Row


def draw(rows: Sequence[Row], path: str, title: str) -> None:
    """A bar chart: speedup over `none` per task and setting, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.spec != "none"]
    tasks, specs = list(dict.fromkeys(r.category for r in shown)), list(dict.fromkeys(r.spec for r in shown))
    figure, axes = pyplot.subplots(figsize=(min(4 + 0.5 * len(shown), 13), 4.2), layout="constrained")
    width = 0.8 / max(len(specs), 1)
    for k, spec in enumerate(specs):
        for row in (r for r in shown if r.spec == spec):
            _bar(axes, tasks.index(row.category) - 0.4 + width * (k + 0.5), width * 0.92, row, f"C{k}")
        axes.bar([0], [0], color=f"C{k}", label=spec)  # the legend's entry
    axes.axhline(1.0, color="0.3", linewidth=1, linestyle="--", label="no speculation")
    axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], rotation=20, ha="right")
    axes.set_ylabel("speedup, decode tokens/s")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper right", bbox_to_anchor=(1.0, 1.1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bar(axes: Any, x: float, width: float, row: Row, color: str) -> None:
    value, low, high = row.speedup.value, row.speedup.low, row.speedup.high
    if value is None:
        return
    axes.bar(x, value, width=width, color=color)
    if low is not None and high is not None:
        axes.errorbar(x, value, yerr=[[value - low], [high - value]], color="0.25", linewidth=1, capsize=2)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
    at = {"xytext": (0, 3), "textcoords": "offset points"}
    axes.annotate(f"{value:.2f}", (x, max(value, high or value)), ha="center", fontsize=7, bbox=box, **at)
