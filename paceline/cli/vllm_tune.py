"""`paceline vllm tune`: measure which draft length pays at which batch size, for stock vLLM's own table."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from paceline.cli.vllm_serve import NGRAM, require_vllm, vllm_version
from paceline.errors import ConfigError, InputError

EPILOG = """\
examples:
  paceline vllm tune MODEL
  paceline vllm tune MODEL --batch-sizes 1,4,16,64 --lengths 0,2,4 --engine '{"dtype": "bfloat16"}'

Prints a table by batch size, and the line for --speculative-config. Losing rows are printed as well. The table is
what a few seconds of one workload say; Paceline's scheduler follows the load by itself and needs none.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "tune",
        help="measure a batch-size table for stock vLLM",
        description="Measure which draft length pays at which batch size.",
        usage="paceline vllm tune MODEL [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="what `vllm serve` would get")
    parser.add_argument(
        "--speculative-config", type=_object, default=NGRAM, metavar="JSON", help="vLLM's; default n-gram"
    )
    parser.add_argument("--engine", type=_object, default={}, metavar="JSON", help="more options of vLLM's LLM class")
    parser.add_argument("--batch-sizes", type=_numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,N,...")
    parser.add_argument("--lengths", type=_numbers, metavar="K,K,...", help="default: 0, 1, 2, 4, .. up to the most")
    parser.add_argument("--prompts", metavar="FILE", help="questions, one JSON object a line (default: built-in)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="for each request (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    require_vllm()
    spec = dict(args.speculative_config)
    most = spec.get("num_speculative_tokens")
    if not isinstance(most, int) or most < 1:
        raise ConfigError("needs num_speculative_tokens.", field="--speculative-config")
    if spec.get("method") == "suffix":
        raise ConfigError(
            "suffix stops the engine if a table asks it for less.",
            field="--speculative-config",
            fix="Serve it with Paceline's scheduler, which trims its drafts instead.",
        )
    lengths = sorted({0, *(args.lengths or [n for n in (1, 2, 4, 8, 16) if n < most]), most})
    if max(lengths) > most:
        raise InputError(f"has {max(lengths)}, and num_speculative_tokens is {most}.", field="--lengths")
    rates = measure(args, spec, lengths)
    report(args, spec, lengths, rates)
    return 0


def measure(args: argparse.Namespace, spec: dict[str, Any], lengths: list[int]) -> dict[int, dict[int, list[float]]]:
    """Output tokens per second of every repeat, by batch size and length, in one engine, interleaved."""
    from paceline.bench.spec import builtin_questions, parse_questions
    from paceline.cli.options import read_jsonl
    from paceline.integrations.vllm.asking import BOARD

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler must be within reach
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    from vllm import LLM, SamplingParams

    questions = parse_questions(read_jsonl(args.prompts or builtin_questions(), "--prompts"), name="--prompts")
    texts = [question.turns[0] for question in questions]
    most = max(args.batch_sizes)
    llm = LLM(args.model, speculative_config=spec, **{"max_num_seqs": most, **args.engine})
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    rates: dict[int, dict[int, list[float]]] = {}
    for size in args.batch_sizes:
        rates[size] = {length: [] for length in lengths}
        for repeat in range(args.repeats + 1):  # the first pass is not counted
            prompts = [texts[(repeat * size + i) % len(texts)] for i in range(size)]
            for length in lengths:
                scheduler.dynamic_sd_lookup = [length] * (scheduler.max_num_running_reqs + 1)
                BOARD.length = length
                started = time.perf_counter()
                done = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - started
                if repeat:
                    rates[size][length].append(sum(len(d.outputs[0].token_ids) for d in done) / seconds)
        print(f"batch {size} measured", file=sys.stderr, flush=True)
    return rates


def report(
    args: argparse.Namespace, spec: dict[str, Any], lengths: list[int], rates: dict[int, dict[int, list[float]]]
) -> None:
    """Print the rates over those without speculation, the table, and where it goes."""
    from paceline.integrations.vllm.table import batch_table, best_lengths

    medians = {size: {n: statistics.median(runs) for n, runs in row.items()} for size, row in rates.items()}
    best = best_lengths(medians)
    print("batch  tok/s at 0   " + "  ".join(f"{n:>2} tokens" for n in lengths[1:]) + "   best")
    for size, row in medians.items():
        ratios = "  ".join(f"{row[n] / row[0]:>8.2f}x" for n in lengths[1:])
        print(f"{size:>5}  {row[0]:>10.1f}   {ratios}   {best[size]:>4}")
    table = batch_table(best)
    print("\nnum_speculative_tokens_per_batch_size:", json.dumps(table))
    print("--speculative-config", repr(json.dumps({**spec, "num_speculative_tokens_per_batch_size": table})))
    if args.json:
        about = {"vllm": vllm_version(), "model": Path(args.model).name, "command": sys.argv, "table": table}
        text = json.dumps({**about, "speculative_config": spec, "tokens_per_second": rates}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 0:
        raise argparse.ArgumentTypeError("must be whole numbers, as in 1,2,4")
    return values


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
