"""The `paceline` command: finds the subcommand, runs it, and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad arguments or input, 130 interrupted (what was finished is kept).

A subcommand is one module of `paceline.cli` with `register(subparsers)`; it sets `run`, a function from the
parsed arguments to an exit code. Modules import PyTorch and the engine inside `run` only, so that `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from paceline.cli.options import package_version
from paceline.errors import InputError, PacelineError

COMMANDS = ("demo", "generate", "chat", "serve", "pull", "profile", "bench", "train", "vllm")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

EPILOG = """\
examples:
  paceline demo
  paceline generate smollm2-135m --chat --prompt "Name three rivers." --temperature 0
  paceline chat smollm2-135m
  paceline serve smollm2-135m --port 8000
  paceline bench spec smollm2-135m --speculation auto ngram:k=4

`paceline COMMAND --help` shows the options and examples of a command.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are two lines and exit with 2."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read on."""
        self.exit(EXIT_BAD_INPUT, f"error: {message}\nTry `{self.prog} --help`.\n")


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="paceline",
        description="Run large language models with lossless speculative decoding.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"paceline {package_version('paceline')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"paceline.cli.{name}").register(subparsers)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a usage error ends the process with exit code 2."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # Older argparse fills an optional positional (`generate MODEL [-]`) as soon as it sees the one before it,
    # and then has no place for a `-` that stands after options.
    if rest == ["-"] and getattr(args, "stdin", "-") is None:
        args.stdin, rest = "-", []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except InputError as error:
        return _fail(f"error: {error}", EXIT_BAD_INPUT)
    except PacelineError as error:
        return _fail(f"error: {error}", EXIT_FAILED)
    except BrokenPipeError:
        # The reader of our output has gone (`paceline ... | head`); do not flush into it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return _fail(f"error: {error}", EXIT_FAILED)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
