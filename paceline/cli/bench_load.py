"""`paceline bench load`: many requests at once, in this process or against any OpenAI servers.

The JSON of `--json` (times are seconds, None where nothing was measured or the server does not tell):

    complete       false if the bench was interrupted or an engine died
    mode           "in process" or "http"; model, models (by server), sampling, host, extent, workload
    settings, points, slo
    rows           one per run: setting, point, repeat, requests, failed, seconds, prompt_tokens, output_tokens,
                   tokens_per_second, requests_per_second, mean_latency, slo_attainment, exact_token_times,
                   {ttft,itl,gap,e2e}_{mean,p50,p90,p95,p99}, mean_accepted_length, draft_tokens, accepted_tokens
    summary        one per load level and setting: the same with the repeats pooled, and throughput_ratio and
                   latency_ratio over the first setting and over_best_fixed, each with value, low, high (95%)
    distributions  quantiles 0, 2, .. 100 of ttft, itl, gap and e2e per load level and setting
    over_time      per run: seconds (middles of at most 600 bins) and series: running, waiting, tokens_per_second,
                   draft_nodes (per request and step), looks_ahead (share of steps), slot_price, and by drafter
                   acceptance/NAME (given that the parent was accepted; over HTTP accepted over drafted),
                   asked/NAME and used/NAME (share of steps in which it was asked, and had nodes verified)
    reliability    by setting and drafter: nodes, predicted, observed per class, and calibration_error
    requests       one per request: setting, point, repeat, index, due, ttft, mean_itl, e2e, tokens, error
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.bench_load_args import add_arguments, check, seconds
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.bench.arrivals import Point
    from paceline.bench.load import Client, Extent, Run
    from paceline.bench.load_http import HTTPClient
    from paceline.bench.load_stats import SLO
    from paceline.bench.workload import Workload


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = add_arguments(kinds)
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, before it is known by whom."""

    points: tuple[Point, ...]
    workload: Workload
    extent: Extent
    slo: SLO


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check(args)
    bench = plan(args)
    for flag, path in (("--json", args.json), ("--html", args.html)):
        options.check_writable(path, flag)
    console = options.stderr_console()
    runs: list[Run] = []
    stopped: BaseException | None = None
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        clients, about = (_servers if args.url else _engines)(args, bench, stack, runner, console)
        try:
            for item in _measure(clients, bench, runner, console):
                runs.append(item)
        except (KeyboardInterrupt, PacelineError) as error:
            stopped = error
    result = _result(args, bench, runs, list(clients), about, complete=stopped is None)
    _publish(result, args)
    if stopped is not None:
        raise stopped
    _fail_if_nothing_worked(runs)
    return 0


def plan(args: argparse.Namespace) -> Bench:
    """Load levels, requests and limits of a command line.

    Raises:
        InputError: a question file or trace that cannot be read (the message names the line).
    """
    from paceline.bench import spec
    from paceline.bench.arrivals import Closed, Poisson, Replay, read_trace
    from paceline.bench.load import Extent
    from paceline.bench.load_stats import SLO
    from paceline.bench.workload import Lengths, Workload

    lines = options.read_jsonl(args.questions or spec.builtin_questions(), "--questions")
    questions = tuple(spec.parse_questions(lines, name="--questions"))
    trace = tuple(read_trace(args.trace)) if args.trace else None
    points: list[Point] = [*map(Closed, args.users or ()), *map(Poisson, args.rate or ())]
    points += [Replay(trace, factor) for factor in args.rate_factor or (1.0,)] if trace else []
    lengths = Lengths(args.length_scale or 1.0, args.max_context, args.max_output)
    return Bench(
        tuple(dict.fromkeys(points)),
        Workload(questions, args.max_tokens, args.seed, trace, lengths),
        Extent(args.repeats, args.requests, args.duration),
        SLO(seconds(args.slo_ttft), seconds(args.slo_itl), args.slo_e2e),
    )


def _sampling(args: argparse.Namespace) -> Any:
    from paceline.config import SamplingParams

    return SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed, ignore_eos=args.ignore_eos
    )


def _engines(
    args: argparse.Namespace, bench: Bench, stack: contextlib.ExitStack, runner: asyncio.Runner, console: Console
) -> tuple[dict[str, Client], dict[str, Any]]:
    """One engine per setting over shared weights, warm; `none` is the first."""
    from paceline.bench import spec
    from paceline.bench.host import host_info
    from paceline.bench.load import warm_up
    from paceline.bench.load_local import LocalClient
    from paceline.plan.spec import parse_speculation

    specs = [spec.BASELINE, *dict.fromkeys(s for s in args.speculation if s != spec.BASELINE)]
    engines = {text: options.engine_options(args, text) for text in specs}
    params, model = _sampling(args), args.model
    clients: dict[str, Client] = {}
    for text, engine in engines.items():
        llm = stack.enter_context(options.open_llm(model, engine, console))
        model = llm.loaded  # the weights are there once, whatever the number of engines
        client = LocalClient(llm, params)
        stack.callback(client.close)
        clients[text] = client
    with options.status(console, "warming up"):
        errors = runner.run(warm_up(clients, bench.workload))
    for text, error in errors.items():
        raise PacelineError(f"{text} cannot answer: {error}")
    return clients, {
        "mode": "in process",
        "model": args.model,
        "host": host_info(model.precision, model.device),
        "fixed": [text for text in specs if parse_speculation(text).policy in ("none", "fixed")],
    }


def _servers(
    args: argparse.Namespace, bench: Bench, stack: contextlib.ExitStack, runner: asyncio.Runner, console: Console
) -> tuple[dict[str, Client], dict[str, Any]]:
    """One client per server, connected and warm; the first one named is the baseline."""
    import torch

    from paceline.bench.host import host_info
    from paceline.bench.load import warm_up
    from paceline.bench.load_http import Asking, HTTPClient

    asking = Asking(_sampling(args), args.endpoint == "chat", args.api_key, args.timeout)
    texts = [question.turns[0] for question in bench.workload.questions]
    clients: dict[str, HTTPClient] = {}
    with options.status(console, "connecting"):
        for name, url in args.url:
            client = clients[name] = HTTPClient(name, url, asking)
            stack.callback(_close, runner, client)
            runner.run(client.connect(texts))
        runner.run(warm_up(clients, bench.workload))  # a request that fails now fails again, and is counted then
    host = host_info("float32", torch.device("cpu"))
    return dict(clients), {
        "mode": "http",
        "model": next(iter(clients.values())).model,
        "models": {name: client.model for name, client in clients.items()},
        "urls": dict(args.url),
        "endpoint": args.endpoint,
        "host": {key: value for key, value in host.items() if key not in ("dtype", "torch_threads")},
        "fixed": [],
    }


def _close(runner: asyncio.Runner, client: HTTPClient) -> None:
    runner.run(client.close())


def _measure(clients: Mapping[str, Client], bench: Bench, runner: asyncio.Runner, console: Console) -> Iterator[Run]:
    """Measure behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paceline.bench.load import measure

    total = bench.extent.repeats * len(bench.points) * len(clients)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    answered = 0
    # A slow refresh: drawing takes time on a machine whose time is being measured.
    with Progress(*columns, console=console, refresh_per_second=1, transient=True) as bar:
        task = bar.add_task("runs", total=total)

        def on_answer() -> None:
            nonlocal answered
            answered += 1
            bar.update(task, description=f"runs ({answered} requests)")

        for item in measure(clients, bench.points, bench.workload, bench.extent, runner, on_answer):
            yield item
            bar.update(task, advance=1)


def _result(
    args: argparse.Namespace,
    bench: Bench,
    runs: Sequence[Run],
    settings: Sequence[str],
    about: Mapping[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The JSON; its schema is above."""
    from paceline.bench.load_stats import document

    about = dict(about)
    fixed = about.pop("fixed")
    return {
        **about,
        "complete": complete,
        "sampling": {name: getattr(args, name) for name in ("temperature", "seed", "ignore_eos", "max_tokens")},
        "extent": dataclasses.asdict(bench.extent),
        "workload": {
            "questions": args.questions or "built-in",
            "distinct_prompts": len(bench.workload.questions),
            "trace": args.trace,
            **dataclasses.asdict(bench.workload.lengths),
        },
        **document(runs, settings, bench.slo, fixed=fixed),
    }


def _publish(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Write JSON and HTML, and print the table (to stderr when the JSON goes to stdout)."""
    from paceline.bench.load_report import html
    from paceline.cli.bench_load_table import print_report

    if args.json is not None:
        options.write_json(result, args.json)
    console = options.stderr_console() if args.json == "-" else options.stdout_console()
    print_report(result, console)
    if args.html is not None:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(html(result))
        console.print(f"Report: {args.html}", style="dim")


def _fail_if_nothing_worked(runs: Sequence[Run]) -> None:
    errors = [answer.error for run in runs for answer in run.answers]
    if errors and all(errors):
        raise PacelineError(f"every request failed; the first: {errors[0]}")
