"""The chart of a replay bench: goodput over no look-ahead against the batch, one panel per trace and drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.bench.replay_table import BEST_FIXED, Row

_STYLE: dict[str, dict[str, Any]] = {
    "none": {"color": "0.6", "linestyle": ":"},
    BEST_FIXED: {"color": "black", "linestyle": "--", "marker": "o"},
    "oracle": {"color": "0.75", "linestyle": "-"},
    "auto": {"color": "C3", "linestyle": "-", "marker": "o", "linewidth": 2.2, "zorder": 5},
}


def draw(rows: Sequence[Row], path: str, title: str) -> None:
    """Write the chart to a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces, drafters = list(dict.fromkeys(r.trace for r in rows)), list(dict.fromkeys(r.drafter for r in rows))
    figure, grid = pyplot.subplots(
        len(traces),
        len(drafters),
        figsize=(1.5 + 3.6 * len(drafters), 1.4 + 2.5 * len(traces)),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for i, trace in enumerate(traces):
        for j, drafter in enumerate(drafters):
            axes = grid[i][j]
            cell = [r for r in rows if r.trace == trace and r.drafter == drafter and r.over_none is not None]
            for policy in dict.fromkeys(r.policy for r in cell):
                line = sorted((r.batch, r.over_none) for r in cell if r.policy == policy)
                axes.plot(*zip(*line, strict=True), label=policy, markersize=3.5, **_STYLE.get(policy, {}))
            axes.set_xscale("log", base=2)
            axes.set_title(f"{trace} · {drafter}", fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92")
    batches = sorted({r.batch for r in rows})
    grid[0][0].set_xticks(batches, [str(b) for b in batches])
    figure.supxlabel("requests at once", fontsize=9)
    figure.supylabel("goodput over no look-ahead", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
