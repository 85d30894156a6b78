"""The chart of a lane bench: speed over no look-ahead against acceptance, one panel per speed ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.bench.lane_table import Row

_STYLE: dict[str, dict[str, Any]] = {
    "none": {"color": "0.6", "linestyle": ":"},
    "speculation": {"color": "black", "linestyle": "--", "marker": "o"},
    "PEARL, pre only": {"color": "C1", "linestyle": ":", "marker": "."},
    "PEARL, post only": {"color": "C1", "linestyle": "-.", "marker": "."},
    "PEARL": {"color": "C3", "linestyle": "-", "marker": "o", "linewidth": 2.2, "zorder": 5},
    "PipeInfer": {"color": "C0", "linestyle": "-", "marker": "s"},
}


def draw(rows: Sequence[Row], path: str, title: str) -> None:
    """Write the chart to a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = list(dict.fromkeys(row.ratio for row in rows))
    size = (1.5 + 3.0 * len(ratios), 3.8)
    figure, grid = pyplot.subplots(1, len(ratios), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, ratio in zip(grid[0], ratios, strict=True):
        cell = [row for row in rows if row.ratio == ratio]
        for name in dict.fromkeys(row.schedule for row in cell):
            line = sorted((row.acceptance, row.over_none) for row in cell if row.schedule == name)
            axes.plot(*zip(*line, strict=True), label=name, markersize=3.5, **_STYLE.get(name, {}))
        axes.set_title(f"target / draft = {ratio:g}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    figure.supxlabel("acceptance rate", fontsize=9)
    figure.supylabel("speed over no look-ahead", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
