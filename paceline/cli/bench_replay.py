"""`paceline bench replay`: length policies on recorded outputs and modelled step times."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.numbers import count, list_of, positive, whole
from paceline.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.bench.replay import Outcome
    from paceline.bench.replay_table import Point, Row
    from paceline.plan.cost_model import CostTable

EPILOG = """\
examples:
  paceline bench replay --trace out.jsonl --cost examples/costs/h200_8b.json --policy auto best-fixed --batch 1,32,128
  paceline bench replay --trace a.jsonl b.jsonl --cost cost.json --policy auto smartspec best-fixed oracle \\
    --batch 1,8,64,256 --drafter recorded:eagle ngram --json replay.json
  paceline bench replay --trace out.jsonl --cost cost.json --policy auto none --batch 64 --rate 12 --prefill 512

A trace file has one request a line: prompt_token_ids, generated_token_ids (greedy), and for every drafter that was
recorded acc_NAME: {"acc_len": [...]}, the tokens that a step at each output position committed. `paceline profile`
writes cost files. Policies: none, fixed:k=K, best-fixed (every K up to --most, best in hindsight), oracle (knows which
draft tokens are right), and those of --speculation: auto, smartspec, smartspec-request, bass, heuristic, threshold:p=P.
Same input, same result: time is modelled, nothing is random but what --seed draws.
"""

_SETTINGS = ("most", "tokens", "requests", "prefill", "rate", "arrivals", "rate_factor", "seed")


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "replay",
        prog="paceline bench replay",
        help="length policies on recorded outputs and modelled step times",
        description="How many tokens per second each length policy gets out of recorded outputs, on an event clock.",
        usage="paceline bench replay --trace FILE [FILE ...] --cost FILE --policy P [P ...] --batch N[,N] [options]",
        epilog=EPILOG,
    )
    parser.add_argument("--trace", nargs="+", metavar="FILE", required=True, help="recorded outputs")
    parser.add_argument("--cost", metavar="FILE", required=True, help="cost table, as `paceline profile --json` writes")
    parser.add_argument("--policy", nargs="+", metavar="P", required=True, help="policies to compare")
    parser.add_argument("--batch", type=list_of(count), metavar="N[,N]", required=True, help="requests at once")
    parser.add_argument(
        "--drafter",
        nargs="+",
        metavar="D",
        help="recorded:NAME or a drafter that reads only tokens (default: all that are recorded, and ngram)",
    )
    parser.add_argument("--most", type=count, default=8, metavar="N", help="most draft tokens, up to 16 (default: 8)")
    parser.add_argument(
        "--tokens", type=count, metavar="N", help="tokens per run (default: 30000, and 240 per request at once)"
    )
    parser.add_argument("--requests", type=count, metavar="N", help="requests taken from each file (default: all)")
    parser.add_argument(
        "--prefill", type=count, default=0, metavar="N", help="prompt tokens per step (default: prompts count as read)"
    )
    arrivals = parser.add_mutually_exclusive_group()
    arrivals.add_argument("--rate", type=positive, metavar="R", help="random arrivals per second, not a closed loop")
    arrivals.add_argument("--arrivals", metavar="FILE", help="arrival times of a trace (CSV with TIMESTAMP)")
    parser.add_argument("--rate-factor", type=positive, default=1.0, metavar="X", help="speed of --arrivals")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of order and random arrivals (default: 0)")
    parser.add_argument("--jobs", type=count, metavar="N", help="processes (default: the number of cores)")
    options.add_json_option(parser, "write the rows as JSON to FILE (and a chart beside it), or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the chart to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.bench.replay_table import rows_of
    from paceline.plan.cost_model import CostTable

    options.check_writable(args.json, "--json")
    plot = options.chart_path(args.json, args.plot)
    table = CostTable.load(args.cost, "--cost")
    points = _points(args)
    console = options.stderr_console()
    found: dict[Point, dict[str, Outcome]] = {point: {} for point in points}
    stopped: KeyboardInterrupt | None = None
    try:
        for point, setting, outcome in _run(points, table, args.jobs, console):
            found[point][setting.policy] = outcome
    except KeyboardInterrupt as error:
        stopped = error
    rows = [row for point in points for row in rows_of(point, found[point], args.policy)]
    result = {
        "cost": str(args.cost),
        "about_cost": dict(table.about),
        "complete": stopped is None,
        "settings": {name: getattr(args, name) for name in _SETTINGS},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    _report(result, rows, args.json, plot)
    if stopped is not None:
        raise stopped
    return 0


def _points(args: argparse.Namespace) -> list[Point]:
    """Every load, checked before anything runs."""
    from paceline.bench.replay import NONE, ORACLE, Setting, parse_policy
    from paceline.bench.replay_table import BEST_FIXED, Point, expand
    from paceline.bench.replay_traces import DEEPEST, RECORDED, check_drafter, read_trace

    if args.most > DEEPEST:
        raise InputError(f"is {args.most}; proposals are kept up to {DEEPEST} tokens.", field="--most")
    policies = list(dict.fromkeys(args.policy))
    args.policy = policies
    for policy in policies:
        if policy not in (NONE, ORACLE, BEST_FIXED):
            parse_policy(policy, args.most)
    names = [Path(path).stem for path in args.trace]
    if len(set(names)) < len(names):
        raise InputError("two files have the same name.", field="--trace")
    points = []
    for path in args.trace:
        trace = read_trace(path, limit=args.requests)
        drafters = args.drafter or [*(RECORDED + name for name in trace[0].right), "ngram"]
        for drafter in drafters:
            check_drafter(trace, drafter)
            for batch in args.batch:
                shared: dict[str, Any] = {
                    "drafter": drafter,
                    "batch": batch,
                    "tokens": args.tokens or max(30_000, 240 * batch),
                    "most": args.most,
                    "prefill": args.prefill,
                    "arrivals": _arrivals(args, len(trace)),
                    "seed": args.seed,
                }
                settings = tuple(Setting(policy, **shared) for policy in expand(policies, args.most))
                points.append(Point(str(path), args.requests, settings))
    return points


def _arrivals(args: argparse.Namespace, count: int) -> tuple[float, ...]:
    from paceline.bench import arrivals

    if args.rate is not None:
        return tuple(arrivals.Poisson(args.rate).times([args.seed], count=count))
    if args.arrivals is not None:
        rows = tuple(arrivals.read_trace(args.arrivals, field="--arrivals"))
        return tuple(arrivals.Replay(rows, args.rate_factor).times([args.seed], count=count))
    return ()


def _run(points: Sequence[Point], table: CostTable, jobs: int | None, console: Console) -> Any:
    """The outcomes, behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from paceline.bench.replay_table import run_points

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs = sum(len(point.settings) for point in points)
    workers = min(jobs or os.cpu_count() or 1, runs)
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("replaying", total=runs)
        for found in run_points(points, table, workers):
            yield found
            bar.update(task, advance=1)


def _report(result: dict[str, Any], rows: Sequence[Row], json_path: str | None, plot: str | None) -> None:
    if json_path is not None:
        options.write_json(result, json_path)
    console = options.stderr_console() if json_path == "-" else options.stdout_console()
    if not rows:
        console.print("Nothing was measured.")
        return
    console.print(table_of(rows), soft_wrap=False)
    console.print(_note(rows), style="dim")
    if plot is not None:
        from paceline.bench.replay_plot import draw

        draw(rows, plot, "Goodput by length policy, replayed")
        console.print(f"Chart: {plot}", style="dim")


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a table; what loses against the best fixed length or no look-ahead is red."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("trace", "drafter"):
        result.add_column(name, overflow="fold")
    result.add_column("batch", justify="right")
    result.add_column("policy", overflow="fold")
    for name in ("tokens\nper s", "over\nnone", "over best\nfixed", "gap\nclosed", "mean\nlatency", "latency\ngain"):
        result.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        load = (row.trace, row.drafter, row.batch)
        first = i == 0 or load != (rows[i - 1].trace, rows[i - 1].drafter, rows[i - 1].batch)
        last = i + 1 == len(rows) or load != (rows[i + 1].trace, rows[i + 1].drafter, rows[i + 1].batch)
        cells = (row.trace, row.drafter, str(row.batch)) if first else ("", "", "")
        result.add_row(*cells, *_cells(row), end_section=last)
    return result


def _cells(row: Row) -> list[str]:
    name = row.policy if row.best_k is None else f"{row.policy} (k={row.best_k})"
    return [
        name,
        f"{row.goodput:,.0f}",
        _times(row.over_none),
        _times(row.over_best_fixed),
        "–" if row.gap_closed is None else f"{row.gap_closed:.0%}",
        "–" if row.mean_latency is None else f"{row.mean_latency:.3g} s",
        _times(row.latency_gain),
    ]


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    text = f"{ratio:.3f}x"
    return f"[red]{text}[/red]" if ratio < 0.995 else text


def _note(rows: Sequence[Row]) -> str:
    lines = [
        "Replay: recorded tokens and acceptance, modelled time. Red: more than half a percent slower.",
        "Latency gain: mean latency of the best fixed length over the policy's. With arrivals best means by latency.",
    ]
    for policy in dict.fromkeys(row.policy for row in rows):
        ratios = [r.over_best_fixed for r in rows if r.policy == policy and r.over_best_fixed is not None]
        if ratios and policy != "best-fixed":
            lines.append(f"{policy}: {min(ratios):.3f} to {max(ratios):.3f} times the best fixed length.")
    return "\n".join(lines)
