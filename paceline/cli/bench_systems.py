"""`paceline bench systems`: what published systems claim, measured here, one row per test."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.bench.systems.base import Row, System
    from paceline.bench.systems.context import Context

EPILOG = """\
examples:
  paceline bench systems --list
  paceline bench systems chen token-recycling
  paceline bench systems --quick --json systems.json
  paceline bench systems smartspec bass --traces recorded/

Without a name all systems run; those that are not in yet say so. Models run in fp32, so that outputs can be compared
token for token. Exit code 1: a test failed. Ctrl-C keeps the rows that are finished.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "systems",
        prog="paceline bench systems",
        help="published systems: what they claim, measured here",
        description="One row per test of each published system: the measured figure, its bound, and whether it holds.",
        usage="paceline bench systems [NAME ...] [options]",
        epilog=EPILOG,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="systems to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list all systems and run nothing")
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="MODEL",
        help="folder, GGUF file, hub id or built-in name (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer prompts and tokens")
    parser.add_argument("--draft", metavar="DRAFT", help="draft model (default: the target without some layers)")
    parser.add_argument(
        "--traces",
        metavar="DIR",
        help="recorded outputs (*.jsonl) and cost tables (*.json) for replays (default: the examples)",
    )
    options.add_json_option(parser, "write all rows as JSON to FILE, or to stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.bench.systems.context import Context
    from paceline.bench.systems.registry import find

    systems = find(list(dict.fromkeys(args.names)))
    if args.list:
        _list(systems, args.json)
        return 0
    options.check_writable(args.json, "--json")
    traces = None if args.traces is None else Path(args.traces)
    if traces is not None and not traces.is_dir():
        raise ConfigError(f"{traces} is no folder.", field="--traces")
    console = options.stderr_console()
    rows: list[Row] = []
    stopped: KeyboardInterrupt | None = None
    context = Context(args.model, quick=args.quick, draft=args.draft, traces=traces)
    try:
        for row in _measure(systems, context, console):
            rows.append(row)
    except KeyboardInterrupt as error:
        stopped = error
    finally:
        context.close()
    _report(args, rows, complete=stopped is None)
    if stopped is not None:
        raise stopped
    return 1 if any(row.passed is False for row in rows) else 0


def _measure(systems: Sequence[System], context: Context, console: Console) -> Iterator[Row]:
    """All rows, behind a progress bar that says what is being done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paceline.bench.systems.base import rows_of

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("", total=len(systems))
        for system in systems:

            def say(text: str, name: str = system.name) -> None:
                bar.update(task, description=f"{name}: {text}")

            context.say = say
            yield from rows_of(system, context)
            context.release()
            bar.update(task, advance=1)


def _list(systems: Sequence[System], json_path: str | None) -> None:
    if json_path is not None:
        found = [
            {"number": s.number, "name": s.name, "title": s.title, "arxiv": s.arxiv, "group": s.group} for s in systems
        ]
        options.write_json(
            [{**item, "in": s.run is not None} for item, s in zip(found, systems, strict=True)], json_path
        )
    if json_path == "-":
        return
    table = _table("name", "group", "arXiv", "title", "tests")
    for system in systems:
        table.add_row(system.name, system.group, system.arxiv, system.title, "in" if system.run else "not yet")
    options.stdout_console().print(table, soft_wrap=False)


def _report(args: argparse.Namespace, rows: Sequence[Row], *, complete: bool) -> None:
    """Write the JSON, and print the table (to stderr when the JSON goes to stdout)."""
    import torch

    from paceline.bench.host import host_info

    result = {
        "model": args.model,
        "quick": args.quick,
        "complete": complete,
        "host": host_info(torch.float32, torch.device("cpu")),
        "rows": [row.as_json() for row in rows],
    }
    if args.json is not None:
        options.write_json(result, args.json)
    console = options.stderr_console() if args.json == "-" else options.stdout_console()
    console.print(table_of(rows), soft_wrap=False)
    console.print(_note(rows, complete=complete), style="dim")


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a table; failed ones are red."""
    from rich.text import Text

    table = _table("system", "test", "figure", "threshold", "passed", "note")
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].system != row.system
        last = i + 1 == len(rows) or rows[i + 1].system != row.system
        words = {True: "yes", False: "NO", None: "not yet" if row.figure is None else "undecided"}
        cells = (row.system if first else "", row.test, shown(row.figure), row.threshold, words[row.passed], "")
        note = "" if _absent(row) else row.note
        style = "red" if row.passed is False else "dim" if row.passed is None else ""
        table.add_row(*(Text(cell, style=style) for cell in (*cells[:-1], note)), end_section=last and not _absent(row))
    return table


def _absent(row: Row) -> bool:
    """Whether the row stands for a system that is not in."""
    return row.passed is None and row.figure is None


def _table(*names: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        right = name == "figure"
        whole = name in ("figure", "threshold", "passed", "arXiv", "name", "system")
        table.add_column(name, justify="right" if right else "left", no_wrap=whole, overflow="fold")
    return table


def shown(figure: float | str | None) -> str:
    """A figure in few digits."""
    if figure is None:
        return ""
    if isinstance(figure, str):
        return figure
    return f"{figure:.0f}" if figure == int(figure) and abs(figure) < 1e9 else f"{figure:.4g}"


def _note(rows: Sequence[Row], *, complete: bool) -> str:
    tests = [row for row in rows if not _absent(row)]
    held, undecided = sum(row.passed is True for row in tests), sum(row.passed is None for row in tests)
    measured = {row.system for row in tests}
    missing = len({row.system for row in rows} - measured)
    about = f" ({undecided} undecided: too few measurements)" if undecided else ""
    lines = [f"{held} of {len(tests)} tests of {len(measured)} systems hold{about}; {missing} systems are not in yet."]
    if not complete:
        lines.append("Stopped early: later systems were not run.")
    return "\n".join(lines)
