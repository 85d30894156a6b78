"""`paceline bench accept`: mean accepted length of token-reading drafters on recorded outputs."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.numbers import count, list_of, whole
from paceline.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.bench.accepted_table import Job, Row

EPILOG = """\
examples:
  paceline bench accept --trace outputs.jsonl
  paceline bench accept --trace a.jsonl b.jsonl --drafter ngram suffix ngram+suffix --nodes 16,64 --warmup 20 --json -
  paceline bench accept --trace outputs.jsonl --drafter suffix --control zero

A trace file has one request a line: prompt_token_ids and generated_token_ids (greedy). Requests are replayed in the
order of the file, one at a time; what a drafter learned from one serves the next. Names with + between are drafters
whose trees are merged. Token Recycling is shown the latest tokens that followed each token in outputs, since traces
hold no logits.
Mean accepted length: output tokens per target forward, the target's own token included; 1.00 without speculation.
Controls show what a figure rests on: zero (all state is dropped after every request), shuffle (every recorded output is
put in a random order first), random (every drafted token is replaced by a random one: about 1.00, or something leaks).
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "accept",
        prog="paceline bench accept",
        help="accepted lengths of drafters on recorded outputs",
        description="How many tokens a target forward brings with each token-reading drafter, on recorded outputs.",
        usage="paceline bench accept --trace FILE [FILE ...] [options]",
        epilog=EPILOG,
    )
    parser.add_argument("--trace", nargs="+", metavar="FILE", required=True, help="recorded outputs")
    parser.add_argument(
        "--drafter",
        nargs="+",
        metavar="D",
        default=["ngram", "recycling", "suffix", "ngram+recycling+suffix"],
        help="drafters that read tokens; D+D merges their trees (default: ngram, recycling, suffix, and all three)",
    )
    parser.add_argument(
        "--nodes",
        type=list_of(count),
        default=(16, 32, 64),
        metavar="N[,N]",
        help="most draft nodes per step (default: 16,32,64)",
    )
    parser.add_argument(
        "--warmup", type=whole, default=0, metavar="N", help="requests of each file that are not counted (default: 0)"
    )
    parser.add_argument("--requests", type=count, metavar="N", help="requests taken from each file (default: all)")
    parser.add_argument("--control", choices=("none", "zero", "shuffle", "random"), default="none", help="see below")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the controls (default: 0)")
    parser.add_argument("--jobs", type=count, metavar="N", help="processes (default: the number of cores)")
    options.add_json_option(parser, "write the rows as JSON to FILE or stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.bench.accepted_table import rows_of

    options.check_writable(args.json, "--json")
    jobs = _jobs(args)
    done: dict[int, Row] = {}
    stopped: KeyboardInterrupt | None = None
    try:
        for number, row in _run(jobs, args.jobs, options.stderr_console()):
            done[number] = row
    except KeyboardInterrupt as error:
        stopped = error
    rows = rows_of([done[number] for number in sorted(done)])
    _report(args, rows, complete=stopped is None)
    if stopped is not None:
        raise stopped
    return 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    """Every run, checked before the first one."""
    from paceline.bench.accepted import AcceptSetting, check_reader, check_warmup
    from paceline.bench.accepted_table import Job
    from paceline.bench.replay_traces import read_trace

    if len({Path(path).stem for path in args.trace}) < len(args.trace):
        raise InputError("two files have the same name.", field="--trace")
    control = None if args.control == "none" else args.control
    sets = [tuple(dict.fromkeys(part.strip() for part in text.split("+"))) for text in dict.fromkeys(args.drafter)]
    for drafters in sets:
        for name in drafters:
            check_reader(name)
    jobs = []
    for path in args.trace:
        check_warmup(args.warmup, len(read_trace(path, limit=args.requests)))
        for drafters in sets:
            for nodes in args.nodes:
                setting = AcceptSetting(drafters, nodes, args.warmup, control, args.seed)
                jobs.append(Job(str(path), args.requests, setting))
    return jobs


def _run(jobs: Sequence[Job], workers: int | None, console: Console) -> Iterator[tuple[int, Row]]:
    """The rows as they become ready, behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from paceline.bench.accepted_table import run_jobs

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("replaying", total=len(jobs))
        for found in run_jobs(jobs, min(workers or os.cpu_count() or 1, len(jobs))):
            yield found
            bar.update(task, advance=1)


def _report(args: argparse.Namespace, rows: Sequence[Row], *, complete: bool) -> None:
    import torch

    from paceline.bench.host import host_info

    result = {
        "host": host_info("float32", torch.device("cpu")),
        "complete": complete,
        "settings": {name: getattr(args, name) for name in ("warmup", "requests", "control", "seed")},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    if args.json is not None:
        options.write_json(result, args.json)
    console = options.stderr_console() if args.json == "-" else options.stdout_console()
    if not rows:
        console.print("Nothing was measured.")
        return
    console.print(table_of(rows), soft_wrap=False)
    console.print(_note(args, rows), style="dim")


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a table; a merged tree that accepts less than the best single drafter is red."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("trace", "nodes", "drafter"):
        result.add_column(name, overflow="fold", justify="right" if name == "nodes" else "left")
    for name in ("accepted\nlength", "over best\nsingle", "expected\nlength", "nodes\nverified", "drafting\nms/step"):
        result.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        first = i == 0 or (row.trace, row.nodes) != (rows[i - 1].trace, rows[i - 1].nodes)
        last = i + 1 == len(rows) or (row.trace, row.nodes) != (rows[i + 1].trace, rows[i + 1].nodes)
        over = "–" if row.over_best_single is None else f"{row.over_best_single:.3f}x"
        result.add_row(
            *((row.trace, str(row.nodes)) if first else ("", "")),
            row.drafter,
            f"{row.mean_accepted_length:.3f}",
            f"[red]{over}[/red]" if row.over_best_single is not None and row.over_best_single < 1.0 else over,
            f"{row.expected_length:.3f}",
            f"{row.verified_per_step:.1f}",
            f"{1e3 * row.draft_seconds_per_step:.2f}",
            end_section=last,
        )
    return result


def _note(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    from paceline.bench.accepted import CONTROLS

    lines = [f"Greedy replay in file order; the first {args.warmup} requests of each file are not counted."]
    if args.control != "none":
        lines.append(f"Control {args.control}: {CONTROLS[args.control]}.")
    ratios = [row.over_best_single for row in rows if row.over_best_single is not None]
    if ratios:
        lines.append(f"Merged trees: {min(ratios):.3f} to {max(ratios):.3f} times the best single drafter.")
    return "\n".join(lines)
