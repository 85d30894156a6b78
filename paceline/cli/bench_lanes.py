"""`paceline bench lanes`: would it pay to draft while verifying, here and elsewhere?"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.numbers import count, list_of, not_negative, positive, whole
from paceline.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from paceline.bench.lane_table import Row
    from paceline.bench.lane_times import Machine

EPILOG = """\
examples:
  paceline bench lanes
  paceline bench lanes --clock-only --ratio 2,4,8 --acceptance 0.3,0.6,0.8,0.9 --plot lanes.png
  paceline bench lanes --clock-only --growth 0.2 --stages 8 --json lanes.json

First this machine: forwards of the model and its draft, alone and beside each other, how often the draft is right, and
what they make of it. Then every schedule on an event clock, at its best length, for drafts of other speed and
acceptance, with a lane of its own for each model. In the table, target and draft do not disturb each other.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "lanes",
        prog="paceline bench lanes",
        help="drafting while verifying: would it pay?",
        description="Whether a lane of its own for the draft model (PEARL, PipeInfer) would pay.",
        usage="paceline bench lanes [options]",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="MODEL",
        help="folder, GGUF file, hub id or built-in name (default: %(default)s)",
    )
    parser.add_argument(
        "--draft", default="builtin", metavar="DRAFT", help="draft, as in draft:model=DRAFT (default: %(default)s)"
    )
    parser.add_argument("--clock-only", action="store_true", help="measure nothing on this machine")
    parser.add_argument(
        "--ratio",
        type=list_of(positive),
        default=(2.0, 4.0, 8.0),
        metavar="R[,R]",
        help="draft tokens that take as long as a target forward (default: 2,4,8)",
    )
    parser.add_argument(
        "--acceptance",
        type=list_of(positive),
        default=(0.3, 0.5, 0.7, 0.8, 0.9),
        metavar="A[,A]",
        help="how often a draft token is right (default: 0.3,0.5,0.7,0.8,0.9)",
    )
    parser.add_argument(
        "--growth",
        type=not_negative,
        default=0.0,
        metavar="X",
        help="what each further token adds to a target forward, as a share of one token's (default: 0)",
    )
    parser.add_argument("--stages", type=count, default=4, metavar="N", help="of PipeInfer's pipeline (default: 4)")
    parser.add_argument("--tokens", type=count, default=120, metavar="N", help="of a text (default: 120)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the texts on the clock (default: 0)")
    options.add_json_option(parser, "write the rows as JSON to FILE (and a chart beside it), or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the chart to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.bench.lane_table import Sweep

    if max(args.acceptance) >= 1.0:
        raise InputError("must be below 1.", field="--acceptance")
    options.check_writable(args.json, "--json")
    plot = options.chart_path(args.json, args.plot)
    console = options.stderr_console() if args.json == "-" else options.stdout_console()
    machine = None if args.clock_only else _measure(args)
    if machine is not None:
        console.print(verdict(machine), soft_wrap=True)
    sweep = Sweep(args.ratio, args.acceptance, args.growth, args.stages, args.tokens, args.seed)
    rows = list(sweep.rows())
    if args.json is not None:
        options.write_json(_result(args, machine, rows), args.json)
    console.print(table_of(rows), soft_wrap=False)
    console.print("Speed over no look-ahead, in brackets the length. Red: slower than speculation.", style="dim")
    if plot is not None:
        from paceline.bench.lane_plot import draw

        draw(rows, plot, "Drafting while verifying, on an event clock")
        console.print(f"Chart: {plot}", style="dim")
    return 0


def _measure(args: argparse.Namespace) -> Machine:
    import json

    from paceline.bench.lane_times import measure
    from paceline.bench.spec import builtin_questions
    from paceline.llm import LLM
    from paceline.model.draft_weights import check_is_draft_or_model, is_draft, load_draft
    from paceline.model.loader import load_model

    check_is_draft_or_model(args.draft)
    loaded = load_model(args.model)
    draft = load_draft(args.draft, loaded) if is_draft(args.draft) else load_model(args.draft)
    target_llm, draft_llm = LLM(loaded, speculation="none"), LLM(draft, speculation="none")
    try:
        lines = builtin_questions().read_text(encoding="utf-8").splitlines()[::12]
        texts = [json.loads(line)["turns"][0] for line in lines]
        return measure(target_llm, draft_llm, [_encode(target_llm, text) for text in texts], 48)
    finally:
        target_llm.close()
        draft_llm.close()


def _encode(llm: Any, text: str) -> list[int]:
    if getattr(llm.tokenizer, "chat_template", None):
        return list(llm.chat_prompt([{"role": "user", "content": text}]))
    return list(llm.tokenizer.encode(text))


def verdict(machine: Machine) -> str:
    """What the machine's times say, in words."""
    choice, alone, beside = machine.choice, machine.alone, machine.beside
    target, draft = 1e3 * alone.forward(1), 1e3 * alone.draft
    slow_target, slow_draft = 1e3 * beside.forward(1), 1e3 * beside.draft
    lines = [
        f"With {machine.threads} threads a target forward takes {target:.1f} ms, a draft token {draft:.1f} ms;",
        f"beside each other, with half of the threads each, {slow_target:.1f} and {slow_draft:.1f} ms.",
        f"The draft is right {machine.acceptance:.0%} of the time.",
    ]
    if choice.lanes_pay:
        lines.append(f"Lanes would pay: PEARL with length {choice.length}, {choice.gain:.2f} times as fast as without.")
    else:
        length = f" with length {choice.length}" if choice.length else ""
        lines.append(f"Lanes would not pay: {choice.name}{length} is faster.")
    return "\n".join(lines)


def table_of(rows: Sequence[Row]) -> Table:
    """A line for each point, a column for each schedule."""
    from rich import box
    from rich.table import Table

    names = list(dict.fromkeys(row.schedule for row in rows))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("target /\ndraft", "accep-\ntance", *(name.replace(", ", ",\n") for name in names)):
        table.add_column(name, justify="right", no_wrap=True)
    points = list(dict.fromkeys((row.ratio, row.acceptance) for row in rows))
    for number, (ratio, acceptance) in enumerate(points):
        cell = {row.schedule: row for row in rows if (row.ratio, row.acceptance) == (ratio, acceptance)}
        bar = cell["speculation"].over_none
        last = number + 1 == len(points) or points[number + 1][0] != ratio
        table.add_row(f"{ratio:g}", f"{acceptance:g}", *(_cell(cell[name], bar) for name in names), end_section=last)
    return table


def _cell(row: Row, bar: float) -> str:
    text = f"{row.over_none:.2f}x" + (f" ({row.length})" if row.length else "")
    return f"[red]{text}[/red]" if row.over_none < bar - 0.005 else text


def _result(args: argparse.Namespace, machine: Machine | None, rows: Sequence[Row]) -> dict[str, Any]:
    import torch

    from paceline.bench.host import host_info

    found: dict[str, Any] = {
        "host": host_info("auto", torch.device("cpu")),
        "growth": args.growth,
        "stages": args.stages,
    }
    if machine is not None:
        found["machine"] = {**dataclasses.asdict(machine), "choice": dataclasses.asdict(machine.choice)}
    return {**found, "rows": [dataclasses.asdict(row) for row in rows]}
