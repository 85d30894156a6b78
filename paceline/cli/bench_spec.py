"""`paceline bench spec`: how much faster speculation is on this machine, task by task."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.numbers import count
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.bench.spec import ChatModel, Measured, Question, Ratio, Row
    from paceline.config import SamplingParams

COLUMNS = (
    "tokens\nper s",
    "speedup",
    "95%\ninterval",
    "with\nprefill",
    "accepted\nlength",
    "drafts\ntaken",
    "same\ntext",
)
DEFAULTS = {"temperature": 0.0, "max_tokens": 128, "seed": 0}

EPILOG = """\
examples:
  paceline bench spec smollm2-135m --speculation auto
  paceline bench spec smollm2-135m --speculation auto ngram:k=4 recycling --limit 2 --json spec.json
  paceline bench spec smollm2-135m --speculation auto --questions spec_bench.jsonl --limit 10 --repeats 2

`none` is always measured as well; every setting is an engine of its own, and all share the weights.
A question file has one object a line, as in Spec-Bench:
  {"question_id": 1, "category": "qa", "turns": ["..."]}
--json FILE also draws a chart beside it (FILE with .png). Ctrl-C stops early and reports what was measured.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "spec",
        prog="paceline bench spec",
        help="speculation against none, task by task",
        description="Speedup over no speculation and mean accepted length per task, with 95% intervals, and "
        "whether the output is the same.",
        usage="paceline bench spec MODEL --speculation SPEC [SPEC ...] [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    parser.add_argument("--speculation", nargs="+", metavar="SPEC", required=True, help="settings to compare with none")
    parser.add_argument("--questions", metavar="FILE", help="question file (default: a small set of our own)")
    parser.add_argument("--limit", type=count, metavar="N", help="most questions per task (default: all)")
    parser.add_argument("--turns", type=count, default=1, metavar="N", help="turns per question (default: 1)")
    parser.add_argument("--repeats", type=count, default=1, metavar="N", help="times to ask everything (default: 1)")
    options.add_json_option(parser, "write all numbers as JSON to FILE (and a chart beside it), or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the chart to this file")
    options.add_sampling_options(parser, DEFAULTS)
    options.add_engine_options(parser, speculation=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.bench import spec
    from paceline.bench.host import host_info

    specs = [spec.BASELINE, *dict.fromkeys(s for s in args.speculation if s != spec.BASELINE)]
    settings = {text: options.engine_options(args, text) for text in specs}
    params = options.sampling_params(args)
    options.check_writable(args.json, "--json")
    plot = options.chart_path(args.json, args.plot)
    source = args.questions or spec.builtin_questions()
    lines = options.read_jsonl(source, "--questions")
    questions = spec.parse_questions(lines, limit=args.limit, name="--questions")
    console = options.stderr_console()
    measured: list[Measured] = []
    stopped: BaseException | None = None
    with contextlib.ExitStack() as stack:
        engines: dict[str, Any] = {}
        model: Any = args.model
        for text, engine in settings.items():
            llm = options.open_llm(model, engine, console)
            engines[text] = stack.enter_context(llm)
            model = llm.loaded  # the weights are there once, whatever the number of engines
        host = host_info(model.precision, model.device)
        try:
            for item in _measure(engines, questions, params, args, console):
                measured.append(item)
        except (KeyboardInterrupt, PacelineError) as error:
            stopped = error
    rows = spec.summarise(measured, specs)
    result = {
        **{name: getattr(args, name) for name in ("model", "repeats", "turns", "rule", "tree")},
        "complete": stopped is None,
        "sampling": dataclasses.asdict(params),
        "host": host,
        "rows": [dataclasses.asdict(row) for row in rows],
        "answers": [dataclasses.asdict(item) for item in measured],
    }
    report(result, rows, args.json, plot)
    if stopped is not None:
        raise stopped
    return 0


def _measure(
    engines: dict[str, ChatModel],
    questions: Sequence[Question],
    params: SamplingParams,
    args: argparse.Namespace,
    console: Console,
) -> Iterator[Measured]:
    """Measure behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from paceline.bench import spec

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A slow refresh: drawing takes time on a machine whose time is being measured.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("warm-up", total=len(questions) * args.repeats * len(engines))
        spec.warm_up(engines, questions[0], params)
        for item in spec.measure(engines, questions, params, turns=args.turns, repeats=args.repeats):
            yield item
            bar.update(task, advance=1, description=item.category)


def report(result: dict[str, Any], rows: Sequence[Row], json_path: str | None, plot: str | None) -> None:
    """Write the JSON and the chart, and print the table (to stderr when the JSON goes to stdout)."""
    if json_path is not None:
        options.write_json(result, json_path)
    console = options.stderr_console() if json_path == "-" else options.stdout_console()
    if not rows:
        console.print("Nothing was measured.")
        return
    console.print(table(rows), soft_wrap=False)
    console.print(note(result, rows), style="dim")
    if plot is not None:
        from paceline.bench.plot import draw

        draw(rows, plot, f"{result['model']} · {result['host']['dtype']} · {result['host']['device']}")
        console.print(f"Chart: {plot}", style="dim")


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table; cells where speculation loses are red."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("task", "setting"):
        result.add_column(name, overflow="fold")
    for name in COLUMNS:
        result.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].category != row.category
        last = i + 1 == len(rows) or rows[i + 1].category != row.category
        result.add_row(row.category.replace("_", " ") if first else "", row.spec, *_cells(row), end_section=last)
    return result


def _cells(row: Row) -> list[str]:
    low, high = row.speedup.low, row.speedup.high
    is_base = row.spec == "none"
    interval = "–" if low is None or high is None else _red(f"{low:.2f}–{high:.2f}", high < 1)
    return [
        f"{row.tokens_per_second:.1f}",
        _times(row.speedup),
        "" if is_base else interval,
        _times(row.speedup_total),
        f"{row.mean_accepted_length:.2f}",
        f"{row.accepted_tokens}/{row.draft_tokens}" if row.draft_tokens else "–",
        "" if is_base else _red(f"{row.same_output}/{row.compared}", row.same_output < row.compared),
    ]


def _times(ratio: Ratio) -> str:
    return "–" if ratio.value is None else _red(f"{ratio.value:.2f}x", ratio.value < 1)


def _red(text: str, losing: bool) -> str:
    return f"[red]{text}[/red]" if losing else text


def note(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the table does not say by itself."""
    questions = max(row.questions for row in rows)
    lines = [
        f"{result['model']}, {result['host']['dtype']}, {result['host']['device']}; {questions} questions, "
        f"{result['repeats']} repeat(s), one request at a time. Speedups compare pooled tokens per second; "
        "intervals are bootstraps over questions."
    ]
    if not result["complete"]:
        lines.append("Stopped early: only questions answered with every setting are counted.")
    if any(row.same_output < row.compared for row in rows) and "bfloat16" in result["host"]["dtype"]:
        lines.append("In bfloat16 rounding depends on the batch's shape and can tip near ties; try --dtype float32.")
    return "\n".join(lines)
