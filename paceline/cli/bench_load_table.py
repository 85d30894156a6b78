"""The table that `paceline bench load` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SPEED = ("tokens\nper s", "over\nbaseline", "95%\ninterval", "latency\ngain", "over best\nfixed", "accepted\nlength")
LATENCY = ("TTFT\np50 p99", "ITL ms\np50 p99", "e2e\np50 p99", "SLO", "failed")


def print_report(result: Mapping[str, Any], console: Console) -> None:
    """The table (two of them where one is too wide) and what it does not say by itself."""
    if not result["summary"]:
        console.print("Nothing was measured by every setting.")
        return
    whole = table(result, SPEED + LATENCY)
    fits = console.measure(whole, options=console.options.update(width=1000)).maximum <= console.width
    for part in (whole,) if fits else (table(result, SPEED), table(result, LATENCY)):
        console.print(part, soft_wrap=False)
    console.print("\n".join(notes(result)), style="dim", markup=False)


def table(result: Mapping[str, Any], columns: Sequence[str]) -> Table:
    """The summary as a table; cells where a setting loses are red."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("load", "setting"):
        made.add_column(name, overflow="fold")
    rows = result["summary"]
    contents = [dict(zip(SPEED + LATENCY, cells(row), strict=True)) for row in rows]
    columns = [name for name in columns if any(shown[name] for shown in contents)]
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["point"] != row["point"]
        last = i + 1 == len(rows) or rows[i + 1]["point"] != row["point"]
        names = row["point"] if first else "", escape(row["setting"])
        made.add_row(*names, *(contents[i][name] for name in columns), end_section=last)
    return made


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row's cells after load and setting."""
    over = row.get("throughput_ratio")
    return [
        _number(row["tokens_per_second"], 1),
        _times(over),
        _interval(over),
        _times(row.get("latency_ratio")),
        _times(row.get("over_best_fixed")),
        _number(row["mean_accepted_length"], 2),
        _pair(row, "ttft", 1, "s"),
        _pair(row, "itl", 1000, ""),
        _pair(row, "e2e", 1, "s"),
        "–" if row["slo_attainment"] is None else f"{row['slo_attainment']:.0%}",
        _red(str(row["failed"]), row["failed"] > 0),
    ]


def notes(result: Mapping[str, Any]) -> list[str]:
    """Conditions and reservations."""
    slo, host, extent = result["slo"], result["host"], result["extent"]
    limits = [
        f"{name} {value:g} s"
        for name, value in (("TTFT", slo["ttft"]), ("mean ITL", slo["itl"]), ("end to end", slo["e2e"]))
        if value is not None
    ]
    where = f"{result['model']}, {host.get('dtype', 'over HTTP')}, {host['device']}"
    lines = [
        f"{where}; {extent['repeats']} repeat(s). Baseline: {result['settings'][0]}. "
        f"SLO: {', '.join(limits) or 'none'}.",
        "Ratios above 1 are better; throughput compares tokens per second, latency gain mean end-to-end times. "
        "Intervals are bootstraps over repeats.",
    ]
    if extent["repeats"] < 2:
        lines.append("One repeat gives no intervals and no comparison with the best fixed setting: try --repeats 4.")
    elif extent["repeats"] < 4:
        lines.append("Intervals over so few repeats are rough: try --repeats 4 or more.")
    asked = max(row["requests"] // row["repeats"] for row in result["summary"])
    if result["workload"]["trace"] is None and asked > (distinct := result["workload"]["distinct_prompts"]):
        lines.append(f"{asked} requests of a run were made of {distinct} questions, so some were asked again.")
    if not all(row["exact_token_times"] for row in result["summary"]):
        lines.append("A server does not say how many tokens a chunk carries: ITL there is an even spread over chunks.")
    if not result["complete"]:
        lines.append("Stopped early: only load levels that every setting has run are in the table.")
    failed = [request for request in result["requests"] if request["error"]]
    if failed:
        lines.append(f"{len(failed)} request(s) failed, the first with {failed[0]['setting']}: {failed[0]['error']}")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _times(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    value = ratio["value"]
    return "–" if value is None else _red(f"{value:.2f}x", round(value, 2) < 1)


def _interval(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    low, high = ratio["low"], ratio["high"]
    return "–" if low is None or high is None else _red(f"{low:.2f}–{high:.2f}", round(high, 2) < 1)


def _pair(row: Mapping[str, Any], name: str, factor: float, unit: str) -> str:
    values = [row[f"{name}_p50"], row[f"{name}_p99"]]
    if None in values:
        return "–"
    return " ".join(f"{value * factor:.{2 if unit else 0}f}" for value in values) + unit


def _red(text: str, losing: bool) -> str:
    return f"[red]{text}[/red]" if losing else text
