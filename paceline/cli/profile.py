"""`paceline profile`: what steps of a model cost on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paceline.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.bench.roofline import Roofline
    from paceline.llm import LLM
    from paceline.plan.cost_model import CostTable

EPILOG = """\
examples:
  paceline profile smollm2-135m
  paceline profile smollm2-135m --refresh --json cost.json     also draws cost.png
  paceline profile smollm2-135m --dtype bfloat16 --num-threads 1 --plot cost.png

The engine plans with these times. They are measured once per model, number format, machine, number of threads and
version, and kept under $PACELINE_HOME/profiles; --refresh measures again.

The JSON, in seconds: `seconds[i]` for `tokens[i]` tokens of one sequence without context, plus `per_sequence` for every
further sequence, `per_context_token` and `per_step`; `draft` holds drafters' costs by name, `about` how and where it
was measured, with the roofline. `paceline bench replay --cost FILE` reads it.
"""
NEARLY_FREE = 0.1
"""A forward that takes at most this share longer than one token's is called nearly free."""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "profile",
        help="measure what steps of a model cost",
        description="Measure the time of a forward by its tokens, sequences and context, beside the least that this "
        "machine's memory and arithmetic allow.",
        usage="paceline profile MODEL [--json [FILE|-]] [--plot FILE.png] [--refresh] [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    options.add_json_option(parser, "write the cost table as JSON to FILE (and a chart beside it), or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the chart to this file")
    parser.add_argument("--refresh", action="store_true", help="measure even if the costs are known")
    options.add_engine_options(parser, speculation=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.bench.host import host_info
    from paceline.bench.roofline import measure_roofline

    engine = options.engine_options(args, "none")
    options.check_writable(args.json, "--json")
    plot = options.chart_path(args.json, args.plot)
    console = options.stderr_console()
    with options.open_llm(args.model, engine, console) as llm:
        table, source = costs(llm, console, refresh=args.refresh)
        with options.status(console, "measuring memory and arithmetic"):
            roofline = measure_roofline(llm.loaded)
        host = host_info(llm.loaded.precision, llm.loaded.device)
    bound = {**dataclasses.asdict(roofline), "memory_seconds": roofline.memory_seconds, "ridge_tokens": roofline.ridge}
    table = replace(table, about={**table.about, "roofline": bound, "host": host})
    if args.json is not None:
        options.write_json(table.to_json(), args.json)
    out = options.stderr_console() if args.json == "-" else options.stdout_console()
    threads = f" · {_count(host['torch_threads'], 'thread')}" if llm.loaded.device.type == "cpu" else ""
    title = f"{args.model} · {host['dtype']} · {host['device']}{threads}"
    out.print(title, style="bold")
    out.print(rows(table, roofline), soft_wrap=False)
    out.print(notes(table, roofline), soft_wrap=True)
    out.print(source, style="dim", soft_wrap=True)
    if plot is not None:
        from paceline.bench.profile_plot import draw

        draw(table, roofline, plot, title)
        out.print(f"Chart: {plot}", style="dim", soft_wrap=True)
    return 0


def costs(llm: LLM, console: Console, *, refresh: bool) -> tuple[CostTable, str]:
    """The model's costs, remembered or measured behind a progress bar; and which of the two."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from paceline.engine.profile import new_cost_table, profile_key
    from paceline.engine.profile_cache import load_profile

    engine = llm.engine
    blocks = engine.stages.scheduler.blocks
    key = profile_key(llm.loaded, engine.runner, blocks, engine.max_model_len)
    known = None if refresh else load_profile(key)
    if known is not None:
        when = known.about.get("measured_at", "earlier")
        return known, f"Measured {when}, from {key.path()}; --refresh measures again."
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # A slow refresh: drawing takes time on a machine whose time is being measured.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("measuring step times", total=None)
        table = new_cost_table(
            llm.loaded,
            engine.runner,
            blocks,
            engine.max_model_len,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    return table, f"Measured now; kept in {key.path()}."


def rows(table: CostTable, roofline: Roofline) -> Table:
    """Times of some sizes: powers of two, and the largest."""
    import numpy as np
    from rich import box
    from rich.table import Table

    from paceline.plan.cost_model import CostModel

    result = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("tokens", "ms", "tokens/s", "ms per\nfurther token", "times the\nroofline"):
        result.add_column(name, justify="right", no_wrap=True)
    last = len(table.tokens) - 1
    chosen = [i for i, n in enumerate(table.tokens) if i == last or not n & (n - 1)]
    # Noise of the measurement would make a further token cost less than nothing; the cost model's line does not.
    line = CostModel(table, adapt=False).table_seconds(np.array(table.tokens, dtype=np.float64), 1, 0.0)
    for before, i in zip([None, *chosen], chosen, strict=False):
        n, t = table.tokens[i], table.seconds[i]
        further = "" if before is None else f"{1e3 * (line[i] - line[before]) / (n - table.tokens[before]):.3f}"
        result.add_row(str(n), f"{1e3 * t:.2f}", f"{n / t:.0f}", further, f"{t / roofline.seconds(n):.1f}x")
    return result


def notes(table: CostTable, roofline: Roofline) -> str:
    """What the table of sizes does not say."""
    from paceline.bench.roofline import rate

    free = nearly_free(table)
    lines = [
        f"Nearly free: up to {_count(free, 'token')} take at most {NEARLY_FREE:.0%} longer than one.",
        f"Further sequence: {1e3 * table.per_sequence:.3f} ms. "
        f"Context read: {1e6 * table.per_context_token:.2f} µs a token.",
        f"Roofline: {1e3 * roofline.memory_seconds:.2f} ms to read "
        f"{roofline.weights * roofline.bytes_per_weight / 1e6:.0f} MB of weights at "
        f"{rate(roofline.bytes_per_second, 'B')}; arithmetic at {rate(roofline.flops_per_second, 'FLOP')} "
        f"takes longer from {max(roofline.ridge, 1):.0f} tokens.",
    ]
    if any(t < 0.95 * roofline.seconds(n) for n, t in zip(table.tokens, table.seconds, strict=True)):
        lines.append("Forwards below the roofline: caches hold the weights, or the machine was busier than before.")
    return "\n".join(lines)


def nearly_free(table: CostTable, share: float = NEARLY_FREE) -> int:
    """The most tokens in a forward that takes at most `share` longer than the table's smallest."""
    import numpy as np

    from paceline.plan.cost_model import CostModel

    sizes = np.arange(table.tokens[0], table.tokens[-1] + 1, dtype=np.float64)
    times = CostModel(table, adapt=False).table_seconds(sizes, 1, 0.0)
    return int(sizes[times <= (1.0 + share) * times[0]][-1])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"
