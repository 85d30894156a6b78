"""`paceline pull`: fetch a model once, for later use without a network."""

from __future__ import annotations

import argparse
from typing import Any

from paceline.errors import ConfigError

EPILOG = """\
examples:
  paceline pull smollm2-135m
  paceline pull smollm2-135m --force     fetch it again, replacing what is there

Models are kept under $PACELINE_HOME (default: ~/.cache/paceline).
"""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "pull",
        help="fetch a model",
        description="Fetch a model, check it, and say where it is.",
        usage="paceline pull NAME [--force]",
        epilog=EPILOG,
    )
    parser.add_argument("name", metavar="NAME", help="built-in name (smollm2-135m) or hub id")
    parser.add_argument("--force", action="store_true", help="fetch again even if it is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from paceline.model.builtin import fetch_builtin, is_builtin
    from paceline.model.source import resolve_source

    if args.force and not is_builtin(args.name):
        raise ConfigError("works for built-in models; a hub id is compared with the hub anyway.", field="--force")
    path = fetch_builtin(args.name, force=args.force) if is_builtin(args.name) else resolve_source(args.name)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{args.name}: {path} ({size / 1e6:.0f} MB)")
    return 0
