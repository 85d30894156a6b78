"""The options of `paceline bench load`, and which of them go together."""

from __future__ import annotations

import argparse
from typing import Any

from paceline.cli import options
from paceline.cli.numbers import count, list_of, not_negative, positive
from paceline.config import EngineConfig
from paceline.errors import ConfigError

USAGE = """paceline bench load (MODEL --speculation SPEC [SPEC ...] | --url NAME=URL [--url NAME=URL ...])
                           (--users N[,N] | --rate R[,R] | --trace FILE [--rate-factor X[,X]]) [options]"""

EPILOG = """\
examples:
  paceline bench load smollm2-135m --speculation auto ngram:k=4 --users 1,4,16 --repeats 4 --html load.html
  paceline bench load smollm2-135m --speculation auto --rate 0.5 --requests 40
  paceline bench load smollm2-135m --speculation auto --trace conv.csv --rate-factor 0.2 --length-scale 0.1 \\
    --duration 120 --json load.json --html load.html
  paceline bench load --url paceline=http://127.0.0.1:8000 --url vllm=http://127.0.0.1:8001 --users 1,8

In process `none` is always measured as well and is the baseline, every setting is an engine of its own, and all share
the weights; nothing that is cached or learnt in one run serves another. Over HTTP the first server named is the
baseline; every run has its own cache_salt, but a server that ignores it (llama.cpp) may know prompts of earlier runs.

A trace is CSV: TIMESTAMP,ContextTokens,GeneratedTokens (Azure's LLM inference traces have this form). Every request
then asks for exactly its GeneratedTokens. --rate-factor 2 replays twice as fast as recorded. A question file has one
object a line, as in Spec-Bench: {"question_id": 1, "category": "qa", "turns": ["..."]}

Latencies count from the moment a request was due. Ctrl-C stops early and keeps what was measured.
"""


def add_arguments(kinds: Any) -> Any:
    """Add the kind's parser with all its options."""
    parser = kinds.add_parser(
        "load",
        prog="paceline bench load",
        help="latency and throughput under load, in process or of any OpenAI server",
        description="Latency, throughput, SLO attainment and speculation under load: users who wait for their answers, "
        "random arrivals, or those of a trace.",
        usage=USAGE,
        epilog=EPILOG,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, GGUF file, hub id or built-in name")
    parser.add_argument("--speculation", nargs="+", metavar="SPEC", help="settings to compare with none")
    parser.add_argument("--url", action="append", type=_named_url, metavar="NAME=URL", help="an OpenAI server")
    _add_load(parser)
    _add_requests(parser)
    _add_limits(parser)
    options.add_json_option(parser, "write all numbers as JSON to FILE, or to stdout")
    parser.add_argument("--html", metavar="FILE", help="write a report with plots")
    _add_http(parser)
    options.add_engine_options(parser, speculation=False)
    return parser


def _add_load(parser: Any) -> None:
    group = parser.add_argument_group("load")
    level = group.add_mutually_exclusive_group()
    level.add_argument("--users", type=list_of(count), metavar="N[,N]", help="users who ask, wait, and ask again")
    level.add_argument("--rate", type=list_of(positive), metavar="R[,R]", help="random arrivals per second")
    level.add_argument("--trace", metavar="FILE", help="arrivals and lengths of a trace")
    group.add_argument("--rate-factor", type=list_of(positive), metavar="X[,X]", help="speed of the trace (default: 1)")
    group.add_argument(
        "--requests", type=count, metavar="N", help="requests per run (default: 4 per user, 8 at least; open loop: 64)"
    )
    group.add_argument("--duration", type=positive, metavar="S", help="send requests for that many seconds instead")
    group.add_argument("--repeats", type=count, default=1, metavar="N", help="times to run everything (default: 1)")


def _add_requests(parser: Any) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--questions", metavar="FILE", help="question file (default: a small set of our own)")
    group.add_argument(
        "--max-tokens", type=count, default=64, metavar="N", help="output tokens without a trace (default: 64)"
    )
    group.add_argument("--length-scale", type=positive, metavar="F", help="multiply the trace's lengths")
    group.add_argument("--max-context", type=count, metavar="N", help="cap the trace's context lengths")
    group.add_argument("--max-output", type=count, metavar="N", help="cap the trace's output lengths")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, arrivals, sampling (default: 0)")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate on after the model's end tokens, so that lengths are as wished (default: on)",
    )


def _add_limits(parser: Any) -> None:
    group = parser.add_argument_group("what a request must keep to (0: no limit)")
    group.add_argument("--slo-ttft", type=not_negative, default=2000.0, metavar="MS", help="default: 2000")
    group.add_argument("--slo-itl", type=not_negative, default=200.0, metavar="MS", help="mean; default: 200")
    group.add_argument("--slo-e2e", type=positive, metavar="S", help="default: no limit")


def _add_http(parser: Any) -> None:
    group = parser.add_argument_group("servers")
    group.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default: chat")
    group.add_argument("--api-key", metavar="KEY", help="sent to every --url")
    group.add_argument(
        "--timeout", type=positive, default=600.0, metavar="S", help="silence that fails a request (default: 600)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: the message names one and says what is meant instead.
    """
    if args.url and (args.model or args.speculation):
        raise ConfigError("excludes MODEL and --speculation.", field="--url", fix="A server has its own settings.")
    if not args.url and not (args.model and args.speculation):
        raise ConfigError("nothing to measure.", fix="Give MODEL and --speculation SPEC, or --url NAME=URL.")
    if args.url and len({name for name, _ in args.url}) < len(args.url):
        raise ConfigError("names two servers alike.", field="--url", fix="Give each its own NAME.")
    if not (args.users or args.rate or args.trace):
        raise ConfigError("no load is given.", fix="Give --users N, --rate R or --trace FILE.")
    if args.url:
        defaults = EngineConfig()
        for name in ("dtype", "activations", "device", "eager", "max_model_len", "num_threads", "rule", "tree"):
            if getattr(args, name) != getattr(defaults, name):
                raise ConfigError(
                    "is for an engine in this process.", field="--" + name.replace("_", "-"), fix="Leave it out."
                )
    if not args.trace:
        for name in ("rate_factor", "length_scale", "max_context", "max_output"):
            if getattr(args, name) is not None:
                raise ConfigError("needs a trace.", field="--" + name.replace("_", "-"), fix="Give --trace FILE.")


def seconds(milliseconds: float) -> float | None:
    """A limit given in milliseconds; 0 is none."""
    return milliseconds / 1000 if milliseconds else None


def _named_url(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not (equals and name and url.startswith(("http://", "https://"))):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=http://HOST:PORT")
    return name, url
