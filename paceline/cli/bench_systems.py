"""`paceline bench systems`: what published systems claim, measured here, one row per test."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from paceline.bench.systems.base import Row, System
    from paceline.bench.systems.context import Context

EPILOG = """\
examples:
  paceline bench systems --list
  paceline bench systems chen token-recycling
  paceline bench systems --quick --json systems.json
  paceline bench systems smartspec bass --traces recorded/
  paceline bench systems decoding-sd --drafts runs/study

Without a name all systems run; those that are not in yet say so. Models run in fp32, so that outputs can be compared
token for token. Exit code 1: a test failed. Rows are printed and written whenever a system is done; Ctrl-C and SIGTERM
keep those that are finished.
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
    parser.add_argument("--drafts", metavar="DIR", help="folder of trained drafts, for decoding-sd to study")
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
    options.check_writable(args.json, "--json")
    if args.list:
        _list(systems, args.json)
        return 0
    traces = None if args.traces is None else Path(args.traces)
    if traces is not None and not traces.is_dir():
        raise ConfigError(f"{traces} is no folder.", field="--traces")
    drafts = [] if args.drafts is None else _drafts_in(Path(args.drafts))
    report = Report(args, systems)
    stopped: KeyboardInterrupt | None = None
    context = Context(args.model, quick=args.quick, draft=args.draft, drafts=drafts, traces=traces)
    with _terminated_like_interrupted():
        try:
            context.check_draft()
            _measure(systems, context, report)
        except KeyboardInterrupt as error:
            stopped = error
        finally:
            context.close()
        report.finish(complete=stopped is None)
    if stopped is not None:
        raise stopped
    return 1 if any(row.passed is False for row in report.rows) else 0


def _drafts_in(folder: Path) -> list[Path]:
    """Every draft below, or in a run folder of `paceline train draft` below."""
    from paceline.model.draft_weights import MANIFEST

    found = sorted(manifest.parent for manifest in folder.glob(f"**/{MANIFEST}"))
    if not found:
        raise ConfigError(f"{folder} holds no draft.", field="--drafts", fix="Train some: see examples/train_study.sh.")
    return found


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(systems: Sequence[System], context: Context, report: Report) -> None:
    """Run all systems, behind a progress bar that says what is being done and makes way for rows."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paceline.bench.systems.base import rows_of

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=options.stderr_console(), refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("", total=len(systems))
        for system in systems:

            def say(text: str, name: str = system.name) -> None:
                bar.update(task, description=f"{name}: {text}")

            context.say = say
            for row in rows_of(system, context):
                report.rows.append(row)
            context.release()
            bar.update(task, advance=1)
            bar.stop()
            report.show()
            bar.start()


class Report:
    """The rows so far: printed and written whenever a system is done, so that a long run shows and keeps its results.

    Args:
        args: the command line.
        systems: what will be measured.
    """

    def __init__(self, args: argparse.Namespace, systems: Sequence[System]) -> None:
        import torch

        from paceline.bench.host import host_info

        self.rows: list[Row] = []
        self._shown = 0
        self._path: str | None = args.json
        self._about = {
            "model": args.model,
            "quick": args.quick,
            "host": host_info("float32", torch.device("cpu")),
        }
        self._names = max(len(system.name) for system in systems)
        self._console = options.stderr_console() if args.json == "-" else options.stdout_console()

    def show(self) -> None:
        """Print the rows that are new, and write the file."""
        new = self.rows[self._shown :]
        if new:
            self._console.print(table_of(new, self._names, header=not self._shown), soft_wrap=False)
        self._shown = len(self.rows)
        if self._path != "-":
            self._write(complete=False)

    def finish(self, *, complete: bool) -> None:
        """Print what is left and the sum, and write the JSON for good."""
        self.show()
        self._write(complete=complete)
        self._console.print(_note(self.rows, complete=complete), style="dim")

    def _write(self, *, complete: bool) -> None:
        if self._path is not None:
            rows = [row.as_json() for row in self.rows]
            options.write_json({**self._about, "complete": complete, "rows": rows}, self._path)


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
    table = _table()
    for name in ("name", "group", "arXiv", "title", "tests"):
        table.add_column(name, no_wrap=name in ("name", "arXiv"), overflow="fold")
    for system in systems:
        table.add_row(system.name, system.group, system.arxiv, system.title, "in" if system.run else "not yet")
    options.stdout_console().print(table, soft_wrap=False)


def table_of(rows: Sequence[Row], names: int, *, header: bool) -> Table:
    """The rows of a system as a table, as wide as every other system's; failed ones are red.

    Args:
        rows: of the system.
        names: characters of the longest name of a system.
        header: whether to name the columns.
    """
    from rich.text import Text

    table = _table()
    table.show_header, table.expand = header, True
    for name, width in (("system", max(names, 6)), ("test", None), ("figure", 9), ("threshold", 10), ("passed", 9)):
        right = name == "figure"
        ratio = None if width else 2
        table.add_column(name, justify="right" if right else "left", width=width, ratio=ratio, overflow="fold")
    table.add_column("note", ratio=3, overflow="fold")
    for i, row in enumerate(rows):
        passed = {True: "yes", False: "NO", None: "not yet" if _absent(row) else "undecided"}[row.passed]
        style = "red" if row.passed is False else "dim" if row.passed is None else ""
        name = row.system if i == 0 or rows[i - 1].system != row.system else ""
        note = "" if _absent(row) else row.note
        cells = (name, row.test, shown(row.figure), row.threshold, passed, note)
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def _absent(row: Row) -> bool:
    """Whether the row stands for a system that is not in."""
    return row.passed is None and row.figure is None


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


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
