"""The chart of `paceline profile`."""

from __future__ import annotations

from typing import Any

import numpy as np

from paceline.bench.roofline import Roofline, rate
from paceline.plan.cost_model import CostModel, CostTable

_MEASURED, _MODEL, _BOUND = "#2563c9", "#1d2327", "#d9730d"


def draw(table: CostTable, roofline: Roofline, path: str, title: str) -> None:
    """Time of a forward against its tokens, below it the roofline; and against the context that is read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.6), layout="constrained", gridspec_kw={"width_ratios": [1.6, 1]}
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    _tokens(left, table, roofline)
    _context(right, table)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _tokens(axes: Any, table: CostTable, roofline: Roofline) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = np.geomspace(table.tokens[0], table.tokens[-1], 200)
    line = 1e3 * CostModel(table, adapt=False).table_seconds(sizes, 1, 0.0)
    memory, compute = 1e3 * roofline.memory_seconds, 1e3 * roofline.seconds_per_token * sizes
    bound = np.maximum(memory, compute)
    axes.axhline(memory, color=_BOUND, linewidth=0.8, linestyle=":")
    axes.plot(sizes, np.maximum(compute, bound.min() / 3), color=_BOUND, linewidth=0.8, linestyle=":")
    axes.plot(sizes, bound, color=_BOUND, linewidth=1.8, label=_bound_label(roofline))
    axes.plot(sizes, line, color=_MODEL, linewidth=1.2, label="cost model (no size dearer than a larger one)")
    times = [1e3 * (s + table.per_step) for s in table.seconds]
    axes.plot(table.tokens, times, "o", color=_MEASURED, markersize=4.5, label="measured (the fastest of a few)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bound.min() / 1.6, 1.5 * max(max(times), float(bound.max())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens in the forward (one sequence, no context)")
    axes.set_ylabel("ms")
    axes.set_title("Time against tokens", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def _bound_label(roofline: Roofline) -> str:
    memory, arithmetic = rate(roofline.bytes_per_second, "B"), rate(roofline.flops_per_second, "FLOP")
    return f"roofline: {memory}, {arithmetic}, equally long at {max(roofline.ridge, 1):.0f} tokens"


def _context(axes: Any, table: CostTable) -> None:
    points = table.about.get("measured_context") or []
    longest = max([length for length, _ in points], default=0)
    if len(points) > 1:
        axes.plot(*zip(*[(c, 1e3 * t) for c, t in points], strict=True), "o", color=_MEASURED, markersize=4.5)
    lengths = np.linspace(0.0, longest or 1024, 2)
    line = 1e3 * (table.seconds[0] + table.per_step + table.per_context_token * lengths)
    label = f"{1e6 * table.per_context_token:.3g} µs a context token"
    axes.plot(lengths, line, color=_MODEL, linewidth=1.2, label=label)
    axes.set_ylim(0.0, 1.35 * max([*line.tolist(), *(1e3 * t for _, t in points)]))
    axes.set_xlabel("context tokens read by one new token")
    axes.set_title("Time against context", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
